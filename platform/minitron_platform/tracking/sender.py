"""One pass from the spool to MLflow: what is new in each run's file, in order, parents before their children.

How far each file was sent is committed to `<spool>/.sent.json` after every batch. A crash between sending and
committing replays that batch, which changes nothing: runs are found again by the tag `minitron.key`, parameters and
tags are equal, and metrics carry the time of their event, so the store recognises them (the primary key of its metrics
table is run, name, time, step and value).
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
from minitron.storage import read_json, write_json
from minitron_platform.tracking.moved_database import artifact_folder
from minitron_platform.tracking.spool import KEY, keys, read_events

log = logging.getLogger(__name__)

STATE = ".sent.json"
KEY_TAG = "minitron.key"
METRICS_PER_CALL, PARAMS_PER_CALL, TAGS_PER_CALL = 800, 50, 50  # MLflow takes 1000 entities, 100 params, 100 tags, 1 MB
PARAM_LENGTH, TAG_LENGTH = 6000, 8000  # MLflow's limits, in characters
ARTIFACT_ATTEMPTS = 3  # uploads of one artifact while MLflow itself answers
NOT_TAKEN = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")  # errors that trying again does not mend
# What databases and artifact stores raise through MLflow; looked up only where their drivers are loaded.
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
    """The errors of a tracking server, database or artifact store that is away; requests' errors are OSErrors."""
    from mlflow.exceptions import MlflowException

    loaded = [(sys.modules[module], name) for module, name in DRIVER_ERRORS if module in sys.modules]
    return (MlflowException, OSError, StorageError, *(getattr(module, name) for module, name in loaded))


class Sent:
    """What of a spool is in MLflow: for each key the byte offset sent and the run id. `store` names the experiment."""

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
                log.warning("%s is not readable and everything is sent again, which changes nothing: %s", file, error)

    def belongs_to(self, store: list[Any]) -> None:
        """Begin again where the spool was sent somewhere else before, or where the database was deleted meanwhile."""
        if self.store != store:
            self.store, self.offsets, self.runs = store, {}, {}

    def save(self) -> None:
        write_json(self.file, {"store": self.store, "offsets": dict(self.offsets), "runs": dict(self.runs)})


@dataclass
class Batch:
    """Events of one run that go out together."""

    end: int  # byte offset after the last event
    events: int = 0
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)  # name, value, time in ms, step
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, event: dict[str, Any], end: int) -> None:
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
                if math.isinf(value):  # MLflow's SQLite would show it as 1.8e308
                    self.tags[f"{name}.nonfinite"] = f"{value} at step {event['step']}"
                else:
                    self.metrics.append((name, value, event["t"], event["step"]))

    def full(self) -> bool:
        return len(self.metrics) >= METRICS_PER_CALL or len(self.params) + len(self.tags) >= PARAMS_PER_CALL

    def calls(self) -> Iterator[Call]:
        """The batch as MLflow entities, in pieces that one request may carry."""
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(*metric) for metric in self.metrics]
        params = [Param(name, value[:PARAM_LENGTH]) for name, value in self.params.items()]
        tags = [RunTag(name, value[:TAG_LENGTH]) for name, value in self.tags.items()]
        while metrics or params or tags:
            yield metrics[:METRICS_PER_CALL], params[:PARAMS_PER_CALL], tags[:TAGS_PER_CALL]
            metrics, params, tags = metrics[METRICS_PER_CALL:], params[PARAMS_PER_CALL:], tags[TAGS_PER_CALL:]


class Sender:
    """Sends the new events of a spool; one call of `send_all` is one pass.

    stop: asked between batches whether to leave; opened: called when a run's id becomes known.
    artifacts: where a new experiment keeps its artifacts, None for the server's choice.
    """

    def __init__(
        self,
        spool: Path,
        tracking_uri: str,
        experiment: str,
        *,
        artifacts: str | None,
        stop: Callable[[], bool],
        opened: Callable[[], None],
    ) -> None:
        from mlflow import MlflowClient

        self.spool, self.stop, self.opened = spool, stop, opened
        self.refused = 0
        self._warned: set[str] = set()
        self._tries: dict[tuple[str, int], int] = {}
        self._reason = ""
        self.client = MlflowClient(tracking_uri)
        found = experiment_of(self.client, experiment, artifacts)
        self.experiment_id: str = found.experiment_id
        self.sent = Sent(spool / STATE)
        self.sent.belongs_to([experiment, found.experiment_id, found.creation_time])

    def send_all(self) -> None:
        """One pass over all runs. Raises one of unreachable() when MLflow or an artifact store is away."""
        held: list[Exception] = []
        seen: set[str] = set()
        for key in keys(self.spool):
            self._send(key, seen, held)
        if held:
            raise held[0]

    def _send(self, key: str, seen: set[str], held: list[Exception]) -> None:
        """Send what is new of a run, and its parent before it. What is `held` back waits for the next pass."""
        path = self.spool / f"{key}.jsonl"
        if key in seen or not path.exists():
            return
        seen.add(key)
        if path.stat().st_size < self.sent.offsets.get(key, 0):
            self.sent.offsets[key] = 0  # the file was deleted and begun again
        batch = Batch(self.sent.offsets.get(key, 0))
        for event, end in read_events(path, batch.end):
            if self.stop():
                return
            if event is None:
                self._refuse(key, 1, f"{path} has a line that is not an event before byte {end}")
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
                    self._send(parent, seen, held)
                    if parent not in self.sent.runs and self._find(parent) is None:
                        return  # the parent's start is not written yet
                self._start(key, event)
            elif event["event"] == "end":
                run_id = self._run(key, event["t"])
                if not self._call(self.client.set_terminated, run_id, event["status"], event["t"]):
                    self._refuse(key, 1, f"its end is not recorded: {self._reason}")
            elif not self._artifact(key, event, end, held):
                return
            batch = self._commit(key, Batch(end))
        self._commit(key, batch)

    def _commit(self, key: str, batch: Batch) -> Batch:
        """Send a batch, remember that, and return the next one."""
        if batch.events:
            self._log(key, batch)
        if batch.end != self.sent.offsets.get(key, 0):
            self.sent.offsets[key] = batch.end
            self.sent.save()
        return Batch(batch.end)

    def _log(self, key: str, batch: Batch) -> None:
        run_id = self.sent.runs[key]
        for call in batch.calls():
            if self._call(self.client.log_batch, run_id, *call):
                continue
            if self._is_gone(run_id):
                self._refuse(key, batch.events, f"run {run_id} was deleted in MLflow; what it logs now is not sent")
                return
            for name, one, instead in _singly(call):  # something in it is not taken; the others must get through
                taken = self._call(self.client.log_batch, run_id, *one)
                if not taken and not (instead and self._call(self.client.log_batch, run_id, *instead)):
                    self._refuse(key, 1, f"MLflow does not take {name!r}: {self._reason}")

    def _start(self, key: str, event: dict[str, Any]) -> None:
        """Make the run, or set it back to running where it exists."""
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
        """The run that the events of `key` go to. A process that writes before the run's start gets a bare run."""
        run_id = self.sent.runs.get(key) or self._find(key) or self._create(key, key, time_ms)
        if key not in self.sent.runs:
            self._remember(key, run_id)
        return run_id

    def _create(self, key: str, name: str, time_ms: int) -> str:
        run = self.client.create_run(self.experiment_id, start_time=time_ms, tags={KEY_TAG: key}, run_name=name)
        self._remember(key, run.info.run_id)
        return str(run.info.run_id)

    def _find(self, key: str) -> str | None:
        if not KEY.match(key):
            return None
        found = self.client.search_runs([self.experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=10)
        # Two where a request timed out and was carried out nevertheless: every reader must choose the same one.
        return min((str(run.info.run_id) for run in found), default=None)

    def _remember(self, key: str, run_id: str) -> None:
        self.sent.runs[key] = run_id
        self.sent.save()
        self.opened()

    def _artifact(self, key: str, event: dict[str, Any], end: int, held: list[Exception]) -> bool:
        """Upload a file or folder; False to try again in the next pass. Nothing but this run waits for it."""
        run_id = self._run(key, event["t"])
        upload = self.client.log_artifacts if os.path.isdir(event["path"]) else self.client.log_artifact
        if not os.path.exists(event["path"]):
            self._refuse(key, 1, f"artifact {event['path']} is not there any more")
            return True
        try:
            upload(run_id, event["path"], event["folder"] or None)
        except unreachable() as error:
            self.client.get_run(run_id)  # raises where MLflow itself is away: that costs no attempt
            self._tries[key, end] = self._tries.get((key, end), 0) + 1
            if self._tries[key, end] < ARTIFACT_ATTEMPTS:
                held.append(error)
                return False
            self._refuse(key, 1, f"artifact {event['path']} cannot be uploaded and stays there only: {error}")
        return True

    def _call(self, function: Callable[..., Any], *arguments: Any) -> bool:
        """Call MLflow; False where it will never take these arguments."""
        from mlflow.exceptions import MlflowException

        try:
            function(*arguments)
        except MlflowException as error:
            if error.error_code not in NOT_TAKEN:
                raise
            self._reason = str(error)
            return False
        return True

    def _is_gone(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "deleted")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return True

    def _refuse(self, key: str, events: int, reason: str) -> None:
        self.refused += events
        if key not in self._warned:
            self._warned.add(key)
            log.warning("run %r: %.500s", key, reason)


def experiment_of(client: Any, name: str, artifacts: str | None) -> Any:
    """The MLflow experiment `name`, made on first use. Raises StorageError where it was deleted in MLflow."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        place = None if artifacts is None else f"{artifacts}/{artifact_folder(name)}"
        try:
            # the kind decides which of MLflow's two menus the page opens with
            kind = {"mlflow.experimentKind": "custom_model_development"}
            client.create_experiment(name, artifact_location=place, tags=kind)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver was faster
                raise
        found = client.get_experiment_by_name(name)
    check_not_deleted(found)
    return found


def check_not_deleted(experiment: Any) -> None:
    """Raise StorageError, with the command that restores it, for an experiment that was deleted in MLflow."""
    if experiment.lifecycle_stage == "deleted":
        restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        raise StorageError(f"experiment {experiment.name!r} was deleted in MLflow", f"restore it with: {restore}")


def _singly(call: Call) -> Iterator[tuple[str, Call, Call | None]]:
    """Each entity of a call by itself: its name, the call, and what to send where that is not taken.

    MLflow keeps a parameter's first value for ever; the value of a later run is kept as a tag.
    """
    from mlflow.entities import RunTag

    metrics, params, tags = call
    yield from ((metric.key, ([metric], [], []), None) for metric in metrics)
    yield from ((p.key, ([], [p], []), ([], [], [RunTag(f"changed.{p.key}"[:250], p.value)])) for p in params)
    yield from ((tag.key, ([], [], [tag]), None) for tag in tags)
