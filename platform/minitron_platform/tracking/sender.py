"""Sends the new events of a spool to MLflow: several runs at a time, parents before their children, in large requests.

The events that were read are gathered per run and sent until MLflow has accepted all of them; then their position is saved. If
the process dies before that, they are sent again, which changes nothing: runs are found by their key, parameters and tags are
the same, and a metric point has the time of its event, so that MLflow recognises it (the primary key of its metrics table is
run, name, time, step and value).
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from minitron import storage
from minitron.errors import MinitronError, StorageError
from minitron.names import check_name
from minitron.storage import is_local
from minitron_platform.tracking.changes import Call, Changes, changed, dataset_input
from minitron_platform.tracking.events import Event
from minitron_platform.tracking.mlflow_runs import MlflowRuns, experiment_of
from minitron_platform.tracking.sent import Sent
from minitron_platform.tracking.spool import Spool

log = logging.getLogger(__name__)

AT_ONCE = 8  # requests to a server at the same time; SQLite has one writer
WINDOW = 5000  # events that are read before they are sent
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


def unreachable() -> tuple[type[Exception], ...]:
    """The exception types of a tracking server, database or artifact store that does not answer, or cannot be used.

    The errors of `requests` are OSErrors, ImportError is that of a driver that is not installed, MinitronError of an address.
    """
    from mlflow.exceptions import MlflowException

    loaded = [(sys.modules[module], name) for module, name in DRIVER_ERRORS if module in sys.modules]
    return (MlflowException, OSError, MinitronError, ImportError, *(getattr(module, name) for module, name in loaded))


class Sender:
    """Sends the new events of a spool to an experiment; each call of `send_all` is one pass.

    client: an MlflowClient of `tracking_uri`. artifacts: artifact location of a new experiment; None for the server's default.
    stop: called between requests; if it returns True, the pass ends. on_run_id: called when the MLflow id of a run is known.
    """

    def __init__(
        self,
        spool: Spool,
        client: Any,
        tracking_uri: str,
        experiment: str,
        *,
        artifacts: str | None,
        stop: Callable[[], bool],
        on_run_id: Callable[[], None],
    ) -> None:
        self.spool = spool
        self.stop = stop
        self.on_run_id = on_run_id
        self.at_once = 1 if tracking_uri.startswith("sqlite") else AT_ONCE
        self.refused = 0  # number of events that MLflow rejected for good
        self.accepted = 0  # number of requests that MLflow has accepted
        self.finished = 0  # number of events that are in MLflow, or were refused
        self._warned: set[str] = set()  # keys of runs with a warning about a rejected event
        self._attempts: dict[tuple[str, str, int], int] = {}  # failed uploads, by key, path and time
        self._pending: dict[str, Changes] = {}
        self.client = client
        mlflow_experiment = experiment_of(self.client, experiment, artifacts)
        recipe = spool.folder.split("/")[-2]
        self._creating_parent = threading.Lock()
        self.runs = MlflowRuns(self.client, mlflow_experiment.experiment_id, prefix=recipe)
        self.sent = Sent(spool.folder, [experiment, mlflow_experiment.experiment_id, mlflow_experiment.creation_time])
        self._read = dict(self.sent.offsets)

    def send_all(self) -> None:
        """Send everything that is durable. Raises one of unreachable() if MLflow or an artifact store does not answer."""
        self._gather()
        while self._pending and not self.stop():
            failures: list[Exception] = []
            for level in list(self._levels()):
                with ThreadPoolExecutor(min(self.at_once, len(level))) as pool:
                    failed = list(filter(None, pool.map(self._attempt, level)))
                failures += failed
                if len(failed) == len(level):
                    break
            if failures:
                raise failures[0]
            self._settle()
            self._gather()
        self._settle()

    def _settle(self) -> None:
        """Note the new position once everything that was read is in MLflow."""
        if not self._pending:
            self.runs.remove_doubles()
            self.sent.offsets = dict(self._read)
            self.sent.save_at_times()

    def unsent(self) -> int:
        """Number of events that are not in MLflow."""
        waiting = sum(changes.events for changes in self._pending.values())
        return waiting + count_events(self.spool, self._read)

    def _gather(self) -> None:
        """Read new events, up to WINDOW of them that wait."""
        waiting = sum(changes.events for changes in self._pending.values())
        for event, part, offset in self.spool.unsent(self._read):
            if waiting >= WINDOW:
                return
            self._read[part] = offset
            if event is None:
                self._refuse(
                    "", 1, f"the line of {part} in {self.spool.folder} that ends at byte {offset} is not an event"
                )
            elif event["event"] != "session":
                key = event["key"]
                self._pending.setdefault(key, Changes(key, event["t"])).add(event)
                waiting += 1

    def _levels(self) -> Iterator[list[str]]:
        """The keys that wait, parents before their children; those of one list can be sent at the same time."""
        depths: dict[str, int] = {}

        def depth(key: str) -> int:
            if key not in depths:
                depths[key] = 0  # ends a circle
                parent = self._pending[key].parent
                depths[key] = depth(parent) + 1 if parent in self._pending else 0
            return depths[key]

        for level in range(max(map(depth, self._pending), default=-1) + 1):
            yield [key for key in self._pending if depth(key) == level]

    def _attempt(self, key: str) -> Exception | None:
        """Send what waits of a run; returns the error if MLflow does not answer."""
        if self.stop():
            return None
        try:
            changes = self._pending[key]
            if self._send(changes):
                del self._pending[key]
                self.finished += changes.events
        except unreachable() as error:
            return error
        return None

    def _send(self, changes: Changes) -> bool:
        """Send the changes of a run; False if the next pass must go on."""
        run_id = self._started(changes)
        while call := changes.call():
            if self.stop():
                return False
            if not self._log(changes, run_id, call):
                return True  # the run was deleted
            changes.done(call)
        while changes.artifacts:
            self._upload(changes.key, run_id, changes.artifacts[0])
            del changes.artifacts[0]
        if changes.datasets:  # those that the run has already are not added again
            inputs = [dataset_input(event) for event in changes.datasets]
            if reason := self._rejected(self.client.log_inputs, run_id, inputs):
                self._refuse(changes.key, len(inputs), f"MLflow rejected the datasets of the run: {reason}")
            changes.datasets.clear()
        if changes.end is not None:
            end = changes.end
            if reason := self._rejected(self.client.set_terminated, run_id, end["status"], end["t"]):
                self._refuse(changes.key, 1, f"MLflow rejected the end of the run: {reason}")
        return True

    def _started(self, changes: Changes) -> str:
        """The MLflow run of `changes`: created if there is none, set to running if it starts again."""
        key, start = changes.key, changes.start
        run_id = self.runs.find(key)
        if start is None:
            return run_id or self._create(key, key, changes.time_ms, {})
        if start.get("parent") is not None:
            with self._creating_parent:  # which several children may lack
                parent = self.runs.find(start["parent"]) or self._create(
                    start["parent"], start["parent"], start["t"], {}
                )
            changes.tags["mlflow.parentRunId"] = parent
        if run_id is not None and self._is_gone(run_id):
            self.runs.forget(key)
            run_id = self.runs.find(key)
        if run_id is None:
            run_id = self._create(key, start["name"], changes.time_ms, changes.tags)
        else:
            self.client.update_run(run_id, status="RUNNING", name=start["name"])
            self.accepted += 1
        changes.start = None
        return run_id

    def _create(self, key: str, name: str, time_ms: int, tags: dict[str, str]) -> str:
        """Create a run; removes from `tags` what it was created with."""
        first = dict(list(tags.items())[:20])
        run_id = self.runs.create(key, name, time_ms, first)
        for tag in first:
            del tags[tag]
        self.accepted += 1
        self.on_run_id()
        return run_id

    def _log(self, changes: Changes, run_id: str, call: Call) -> bool:
        """Send a batch, in smaller ones if MLflow rejects it, so that only what is invalid is lost; False for a deleted run."""
        reason = self._rejected(self.client.log_batch, run_id, call.metrics, call.params, call.tags)
        if not reason:
            return True
        if self._is_gone(run_id):
            self._refuse(
                changes.key, changes.events, f"run {run_id} was deleted in MLflow; its new events are not sent"
            )
            return False
        if len(call) > 1:
            return all(self._log(changes, run_id, half) for half in call.halves())
        if call.params:
            from mlflow.entities import RunTag

            param = call.params[0]
            if not self._rejected(self.client.log_batch, run_id, [], [], [RunTag(changed(param.key), param.value)]):
                return True
        (entity,) = (*call.metrics, *call.params, *call.tags)
        self._refuse(changes.key, 1, f"MLflow rejected {entity.key!r}: {reason}")
        return True

    def _upload(self, key: str, run_id: str, event: Event) -> None:
        """Upload an artifact. Raises one of unreachable() if the next pass must try again."""
        run_folder = self.spool.folder.rsplit("/", 1)[0]
        path = event["path"]
        if "://" not in path and not os.path.isabs(path):
            path = storage.join(run_folder, path)
        if not is_uploadable(path, event["folder"], run_folder):
            self._refuse(key, 1, f"artifact {path} is not in {run_folder}, and is not uploaded")
            return
        if not storage.exists(path):
            self._refuse(key, 1, f"artifact {path} no longer exists")
            return
        try:
            with _local_copy(path) as local:
                upload = self.client.log_artifacts if os.path.isdir(local) else self.client.log_artifact
                upload(run_id, local, event["folder"] or None)
            self.accepted += 1
        except unreachable() as error:
            self.client.get_run(
                run_id
            )  # raises if MLflow itself does not answer, which is not counted as a failed attempt
            attempt = (key, path, event["t"])
            self._attempts[attempt] = self._attempts.get(attempt, 0) + 1
            if self._attempts[attempt] < ARTIFACT_ATTEMPTS:
                raise
            self._refuse(key, 1, f"artifact {path} cannot be uploaded: {error}")

    def _rejected(self, function: Callable[..., Any], *arguments: Any) -> str:
        """Call MLflow; returns the reason if it rejects the arguments for good, otherwise an empty text."""
        from mlflow.exceptions import MlflowException

        try:
            function(*arguments)
        except MlflowException as error:
            if error.error_code not in PERMANENT_ERRORS:
                raise
            return str(error)
        self.accepted += 1
        return ""

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


def is_uploadable(path: str, folder: str, run_folder: str) -> bool:
    """Whether an artifact that a spool names may be uploaded: a file, or a local folder of files, that is in the run's folder
    after links are resolved. On a shared disk others may be able to write to a spool.

    folder: of the artifact in MLflow.
    """
    try:
        check_name(folder or ".artifacts", path)
        if not is_local(path):
            return check_name(path.removeprefix(f"{run_folder}/"), path) != path
    except StorageError:
        return False
    local = storage.local_path(path)
    files = [local, *(local.rglob("*") if local.is_dir() else ())]
    return all(file.resolve().is_relative_to(storage.local_path(run_folder).resolve()) for file in files)


def count_events(spool: Spool, offsets: dict[str, int]) -> int:
    """Number of durable events of a spool after the given offsets."""
    return sum(1 for event, _, _ in spool.unsent(offsets) if event is not None and event["event"] != "session")


@contextmanager
def _local_copy(path: str) -> Iterator[str]:
    """A local path with the content of a file; a copy in a temporary folder if it is remote."""
    if is_local(path):
        yield str(storage.local_path(path))
        return
    with tempfile.TemporaryDirectory(prefix="minitron-artifact-") as folder:
        copy = os.path.join(folder, path.rsplit("/", 1)[-1])
        with open(copy, "wb") as file:
            file.write(storage.read_bytes(path))
        yield copy
