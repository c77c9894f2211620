"""Sends the new events of a spool to MLflow: the events of each run in order, parent runs before their children.

The position in each file is saved in `<spool>/.sent.json` after every batch. If the process dies between sending and saving,
the batch is sent again, which changes nothing: runs are found by the tag `minitron.key`, parameters and tags are the same, and
metrics have the time of their event, so that MLflow recognises them (the primary key of its metrics table is run, name, time,
step and value).
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron.errors import StorageError
from minitron.names import check_name
from minitron.storage import read_json, write_json
from minitron_platform.tracking.moved_database import artifact_folder
from minitron_platform.tracking.spool import KEY, keys, read_events

log = logging.getLogger(__name__)

STATE = ".sent.json"
KEY_TAG = "minitron.key"
# MLflow accepts 1000 entities, 100 parameters, 100 tags and 1 MB in a request.
METRICS_PER_CALL = 800
PARAMS_PER_CALL = 50
TAGS_PER_CALL = 50
PARAM_LENGTH = 6000  # MLflow's limit, in characters
TAG_LENGTH = 8000  # MLflow's limit, in characters
ARTIFACT_ATTEMPTS = 3  # failed uploads of an artifact, while MLflow answers, after which it is given up
PERMANENT_ERRORS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")  # a retry would fail as well
# Errors of databases and artifact stores that MLflow passes on; looked up in those of the modules that are imported.
DRIVER_ERRORS = (
    ("alembic.util", "CommandError"),
    ("azure.core.exceptions", "AzureError"),
    ("boto3.exceptions", "Boto3Error"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("google.api_core.exceptions", "GoogleAPIError"),
    ("sqlalchemy.exc", "SQLAlchemyError"),
)
Call = tuple[list[Any], list[Any], list[Any]]  # metrics, params, tags of one log_batch


def unreachable() -> tuple[type[Exception], ...]:
    """The exception types of a tracking server, database or artifact store that does not answer.

    The errors of `requests` are OSErrors.
    """
    from mlflow.exceptions import MlflowException

    loaded = [(sys.modules[module], name) for module, name in DRIVER_ERRORS if module in sys.modules]
    return (MlflowException, OSError, StorageError, *(getattr(module, name) for module, name in loaded))


class Sent:
    """How much of a spool is in MLflow: the byte offset and the MLflow run id of each key, saved in a JSON file.

    `store` identifies the experiment that they belong to.
    """

    def __init__(self, file: Path) -> None:
        self.file = str(file)
        self.store: list[Any] = []
        self.offsets: dict[str, int] = {}
        self.runs: dict[str, str] = {}
        if file.exists():
            try:
                state = read_json(self.file)
                self.store, self.offsets, self.runs = state["store"], state["offsets"], state["runs"]
            except (StorageError, KeyError, TypeError) as error:
                log.warning(
                    "%s cannot be read, so all events are sent again (this changes nothing in MLflow): %s", file, error
                )

    def belongs_to(self, store: list[Any]) -> None:
        """Start again from the beginning if the spool was sent to another experiment or database before."""
        if self.store != store:
            self.store = store
            self.offsets = {}
            self.runs = {}

    def save(self) -> None:
        """Write the file."""
        write_json(self.file, {"store": self.store, "offsets": dict(self.offsets), "runs": dict(self.runs)})


@dataclass
class Batch:
    """Events of one run that are sent together."""

    end: int  # byte offset after the last event
    events: int = 0
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)  # name, value, time in ms, step
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, event: dict[str, Any], end: int) -> None:
        """Add an event with metrics, params or tags. end: byte offset after it."""
        self.end = end
        self.events += 1
        if event["event"] == "tags":
            self.tags.update(event["values"])
        elif event["event"] == "params":
            for name, value in event["values"].items():
                if self.params.setdefault(name, value) != value:
                    self.tags[f"changed.{name}"] = value
        else:
            for name, written in event["values"].items():
                value = float(written)
                if math.isinf(value):  # MLflow would store it in SQLite as 1.8e308
                    self.tags[f"{name}.nonfinite"] = f"{value} at step {event['step']}"
                else:
                    self.metrics.append((name, value, event["t"], event["step"]))

    def full(self) -> bool:
        """Whether the batch should be sent before more is added."""
        return len(self.metrics) >= METRICS_PER_CALL or len(self.params) + len(self.tags) >= PARAMS_PER_CALL

    def calls(self) -> Iterator[Call]:
        """The batch as MLflow entities, in pieces that fit into one request each."""
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(*metric) for metric in self.metrics]
        params = [Param(name, value[:PARAM_LENGTH]) for name, value in self.params.items()]
        tags = [RunTag(name, value[:TAG_LENGTH]) for name, value in self.tags.items()]
        while metrics or params or tags:
            yield metrics[:METRICS_PER_CALL], params[:PARAMS_PER_CALL], tags[:TAGS_PER_CALL]
            metrics, params, tags = metrics[METRICS_PER_CALL:], params[PARAMS_PER_CALL:], tags[TAGS_PER_CALL:]


class Sender:
    """Sends the new events of a spool to an experiment; each call of `send_all` is one pass.

    artifacts: artifact location of a new experiment; None for the server's default. stop: called between events; if it returns
    True, the pass ends. on_run_id: called when the MLflow id of a run becomes known.
    """

    def __init__(
        self,
        spool: Path,
        tracking_uri: str,
        experiment: str,
        *,
        artifacts: str | None,
        stop: Callable[[], bool],
        on_run_id: Callable[[], None],
    ) -> None:
        from mlflow import MlflowClient

        self.spool = spool
        self.stop = stop
        self.on_run_id = on_run_id
        self.refused = 0  # number of events that MLflow rejected for good
        self._warned: set[str] = set()  # keys of runs with a warning about a rejected event
        self._attempts: dict[
            tuple[str, int], int
        ] = {}  # failed uploads, by key and byte offset of the artifact's event
        self._reason = ""  # of the last rejected call
        self.client = MlflowClient(tracking_uri)
        mlflow_experiment = experiment_of(self.client, experiment, artifacts)
        self.experiment_id: str = mlflow_experiment.experiment_id
        self.sent = Sent(spool / STATE)
        self.sent.belongs_to([experiment, mlflow_experiment.experiment_id, mlflow_experiment.creation_time])

    def send_all(self) -> None:
        """Run one pass over all runs. Raises one of unreachable() if MLflow or an artifact store does not answer."""
        failures: list[Exception] = []
        visited: set[str] = set()
        for key in keys(self.spool):
            self._send(key, visited, failures)
        if failures:
            raise failures[0]

    def _send(self, key: str, visited: set[str], failures: list[Exception]) -> None:
        """Send the new events of a run, those of its parent first.

        visited: keys of the runs that this pass has sent, or is sending. failures: receives the errors of artifacts that the
        next pass uploads again.
        """
        path = self.spool / f"{key}.jsonl"
        if key in visited or not path.exists():
            return
        visited.add(key)
        if path.stat().st_size < self.sent.offsets.get(key, 0):
            self.sent.offsets[key] = 0  # the file was deleted and written anew
        batch = Batch(self.sent.offsets.get(key, 0))
        for event, end in read_events(path, batch.end):
            if self.stop():
                return
            if event is None:
                self._refuse(key, 1, f"the line of {path} that ends at byte {end} is not an event")
                batch.end = end
                continue
            if event["event"] in ("metrics", "params", "tags"):
                self._run(key, event["t"])
                batch.add(event, end)
                if batch.full():
                    batch = self._commit(key, batch)
                continue
            batch = self._commit(key, batch)
            if event["event"] == "start":
                parent = event["parent"]
                if parent is not None:
                    self._send(parent, visited, failures)
                    if parent not in self.sent.runs and self._find(parent) is None:
                        return  # the start of the parent is not in the spool yet
                self._start(key, event)
            elif event["event"] == "end":
                run_id = self._run(key, event["t"])
                if not self._call(self.client.set_terminated, run_id, event["status"], event["t"]):
                    self._refuse(key, 1, f"MLflow rejected the end of the run: {self._reason}")
            elif not self._upload(key, event, end, failures):
                return
            batch = self._commit(key, Batch(end))
        self._commit(key, batch)

    def _commit(self, key: str, batch: Batch) -> Batch:
        """Send a batch, save the new position, and return an empty batch that starts there."""
        if batch.events:
            self._log(key, batch)
        if batch.end != self.sent.offsets.get(key, 0):
            self.sent.offsets[key] = batch.end
            self.sent.save()
        return Batch(batch.end)

    def _log(self, key: str, batch: Batch) -> None:
        """Send a batch. If MLflow rejects a request, its entities are sent one by one, so that only invalid ones are lost."""
        run_id = self.sent.runs[key]
        for call in batch.calls():
            if self._call(self.client.log_batch, run_id, *call):
                continue
            if self._is_gone(run_id):
                self._refuse(key, batch.events, f"run {run_id} was deleted in MLflow; its new events are not sent")
                return
            for name, single, alternative in _one_by_one(call):
                accepted = self._call(self.client.log_batch, run_id, *single)
                if not accepted and not (alternative and self._call(self.client.log_batch, run_id, *alternative)):
                    self._refuse(key, 1, f"MLflow rejected {name!r}: {self._reason}")

    def _start(self, key: str, event: dict[str, Any]) -> None:
        """Create the run; if it exists, set its status to running."""
        run_id = self.sent.runs.get(key)
        if run_id is None or self._is_gone(run_id):
            run_id = self._find(key)
        if run_id is None:
            run_id = self._create(key, event["name"], event["t"])
        else:
            self.client.update_run(run_id, status="RUNNING", name=event["name"])
            self._remember(key, run_id)
        tags = dict(event["tags"])
        if event["parent"] is not None:
            tags["mlflow.parentRunId"] = self.sent.runs.get(event["parent"]) or self._find(event["parent"])
        self._log(key, Batch(0, events=1, tags=tags))

    def _run(self, key: str, time_ms: int) -> str:
        """The MLflow run id of `key`. If no start of the run was recorded, a run without name and parent is created."""
        run_id = self.sent.runs.get(key) or self._find(key) or self._create(key, key, time_ms)
        if key not in self.sent.runs:
            self._remember(key, run_id)
        return run_id

    def _create(self, key: str, name: str, time_ms: int) -> str:
        """Create a run that started at `time_ms` (Unix time in milliseconds); returns its MLflow id."""
        run = self.client.create_run(self.experiment_id, start_time=time_ms, tags={KEY_TAG: key}, run_name=name)
        self._remember(key, run.info.run_id)
        return str(run.info.run_id)

    def _find(self, key: str) -> str | None:
        """The id of an existing MLflow run with this key, or None."""
        if not KEY.match(key):
            return None
        runs = self.client.search_runs([self.experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=10)
        # There are two if the server created one although the request timed out; every process must choose the same one.
        return min((str(run.info.run_id) for run in runs), default=None)

    def _remember(self, key: str, run_id: str) -> None:
        self.sent.runs[key] = run_id
        self.sent.save()
        self.on_run_id()

    def _upload(self, key: str, event: dict[str, Any], end: int, failures: list[Exception]) -> bool:
        """Upload an artifact. False if the next pass must try again; until then no later event of this run is sent."""
        run_id = self._run(key, event["t"])
        upload = self.client.log_artifacts if os.path.isdir(event["path"]) else self.client.log_artifact
        if not os.path.exists(event["path"]):
            self._refuse(key, 1, f"artifact {event['path']} no longer exists")
            return True
        if not is_uploadable(event["path"], event["folder"], self.spool.parent):
            self._refuse(key, 1, f"artifact {event['path']} is not in {self.spool.parent}, and is not uploaded")
            return True
        try:
            upload(run_id, event["path"], event["folder"] or None)
        except unreachable() as error:
            self.client.get_run(
                run_id
            )  # raises if MLflow itself does not answer, which is not counted as a failed attempt
            self._attempts[key, end] = self._attempts.get((key, end), 0) + 1
            if self._attempts[key, end] < ARTIFACT_ATTEMPTS:
                failures.append(error)
                return False
            self._refuse(key, 1, f"artifact {event['path']} cannot be uploaded: {error}")
        return True

    def _call(self, function: Callable[..., Any], *arguments: Any) -> bool:
        """Call MLflow; False if it rejects the arguments for good."""
        from mlflow.exceptions import MlflowException

        try:
            function(*arguments)
        except MlflowException as error:
            if error.error_code not in PERMANENT_ERRORS:
                raise
            self._reason = str(error)
            return False
        return True

    def _is_gone(self, run_id: str) -> bool:
        """Whether the run was deleted in MLflow."""
        from mlflow.exceptions import MlflowException

        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "deleted")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return True

    def _refuse(self, key: str, events: int, reason: str) -> None:
        """Count events that are given up, and log the reason of the first for each run."""
        self.refused += events
        if key not in self._warned:
            self._warned.add(key)
            log.warning("run %r: %.500s", key, reason)


def is_uploadable(path: str, folder: str, run_folder: Path) -> bool:
    """Whether an artifact that a spool names may be uploaded: a file, or a folder of files, that is in the run's folder after
    links are resolved. On a shared disk others may be able to write to a spool.

    folder: of the artifact in MLflow.
    """
    files = [Path(path), *(Path(path).rglob("*") if os.path.isdir(path) else ())]
    try:
        check_name(folder or ".artifacts", path)
    except StorageError:
        return False
    return all(file.resolve().is_relative_to(run_folder.resolve()) for file in files)


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


def _one_by_one(call: Call) -> Iterator[tuple[str, Call, Call | None]]:
    """Split a call into one per entity: its name, the call, and the call to make if MLflow rejects that one.

    MLflow does not change the value of a parameter; a different value is sent as a tag instead.
    """
    from mlflow.entities import RunTag

    metrics, params, tags = call
    yield from ((metric.key, ([metric], [], []), None) for metric in metrics)
    yield from ((p.key, ([], [p], []), ([], [], [RunTag(f"changed.{p.key}"[:250], p.value)])) for p in params)
    yield from ((tag.key, ([], [], [tag]), None) for tag in tags)
