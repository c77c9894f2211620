"""The MLflow runs of a spool's keys: one run per key, found by the tag `minitron.key`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from minitron.errors import StorageError
from minitron_platform.tracking.events import KEY
from minitron_platform.tracking.moved_database import artifact_folder

log = logging.getLogger(__name__)

KEY_TAG = "minitron.key"
KIND_TAG = "minitron.kind"  # whether a run is that of a recipe, a stage, a trial or an evaluation
RUN_KIND = "run"
NOTE = "mlflow.note.content"  # the description at the top of a run's page, in Markdown
PAGE = 1000  # runs in one answer


class AnsweredClient:
    """An MlflowClient that counts the requests that MLflow has answered."""

    def __init__(self, tracking_uri: str) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri)
        self.answered = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            result = method(*arguments, **options)
            self.answered += 1
            return result

        return call


class MlflowRuns:
    """The runs of an experiment by key.

    prefix: of the keys of a whole recipe, whose runs are then looked up together.
    """

    def __init__(self, client: Any, experiment_id: str, prefix: str) -> None:
        self.client = client
        self.experiment_id = experiment_id
        self.prefix = prefix
        self.ids: dict[str, str] = {}
        self._looked_up = False
        self._looking_up = threading.Lock()
        self._doubtful: set[str] = (
            set()
        )  # keys whose creation failed, so that the server may or may not have created a run

    def find(self, key: str) -> str | None:
        """The id of the run of a key; None if there is none."""
        if key in self.ids:
            return self.ids[key]
        if key.startswith(self.prefix) and key not in self._doubtful:
            with self._looking_up:
                if not self._looked_up:
                    for existing, run_id in self._search(f"LIKE '{self.prefix}%'"):
                        self._keep(existing, run_id)
                self._looked_up = True
        else:
            for existing, run_id in self._search(f"= '{key}'"):
                self._keep(existing, run_id)
        return self.ids.get(key)

    def create(self, key: str, name: str, time_ms: int, tags: dict[str, str]) -> str:
        """Create the run of a key that has none, with its start in milliseconds of Unix time; returns its id."""
        self._doubtful.add(key)
        run = self.client.create_run(self.experiment_id, start_time=time_ms, tags={**tags, KEY_TAG: key}, run_name=name)
        self._doubtful.discard(key)
        self.ids[key] = str(run.info.run_id)
        return self.ids[key]

    def forget(self, key: str) -> None:
        """Look a run up again next time, because it was deleted."""
        self.ids.pop(key, None)
        self._doubtful.add(key)

    def remove_doubles(self) -> None:
        """Delete runs without content that a server created although it had answered with an error, or not at all."""
        for key in sorted(self._doubtful & self.ids.keys()):
            for existing, run_id in list(self._search(f"= '{key}'")):
                data = self.client.get_run(run_id).data
                if existing == key and run_id != self.ids[key] and not data.metrics and not data.params:
                    self.client.delete_run(run_id)
        self._doubtful.clear()

    def _keep(self, key: str, run_id: str) -> None:
        """Remember a run. Of two with one key, every process must choose the same."""
        self.ids[key] = min(self.ids.get(key, run_id), run_id)

    def _search(self, condition: str) -> Iterator[tuple[str, str]]:
        """Key and id of the active runs whose key meets a condition."""
        token = None
        while True:
            runs = self.client.search_runs(
                [self.experiment_id], f"tags.`{KEY_TAG}` {condition}", max_results=PAGE, page_token=token
            )
            for run in runs:
                key = run.data.tags.get(KEY_TAG, "")
                if KEY.match(key):
                    yield key, str(run.info.run_id)
            token = runs.token
            if not token:
                return


def experiment_of(client: Any, name: str, artifacts: str | None) -> Any:
    """The MLflow experiment `name`, which is created if it does not exist.

    artifacts: artifact location of a new experiment, None for MLflow's default. Raises StorageError for a deleted experiment.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = None if artifacts is None else f"{artifacts}/{artifact_folder(name)}"
        try:
            # the kind decides which of its two menus MLflow's web page shows
            kind = {"mlflow.experimentKind": "custom_model_development"}
            client.create_experiment(name, artifact_location=location, tags=kind)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver was faster
                raise
        experiment = client.get_experiment_by_name(name)
    check_not_deleted(experiment)
    return experiment


def check_not_deleted(experiment: Any) -> None:
    """Raise StorageError for an experiment that was deleted in MLflow; the remedy is the command that restores it."""
    if experiment.lifecycle_stage == "deleted":
        restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        raise StorageError(f"experiment {experiment.name!r} was deleted in MLflow", f"restore it with: {restore}")
