"""Sends a run's records to MLflow in the background, without delaying the run.

`Flusher` runs the passes of sender.py in a thread of the driver. If the tracking server is down, slow or full, the run
continues and no metric is lost: events that are not sent stay in the spool, on disk, until the next pass or the next run.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType

from minitron.errors import InputError, StorageError
from minitron.storage import PRIVATE, disk_errors, lock_file, redact
from minitron_platform.tracking.moved_database import ARTIFACTS, update_addresses
from minitron_platform.tracking.sender import STATE, Sender, Sent, unreachable
from minitron_platform.tracking.spool import keys, read_events, spool_folder

log = logging.getLogger(__name__)

LONGEST_PAUSE = 60.0  # seconds between attempts when MLflow does not answer
LAST_ATTEMPTS = 3  # consecutive failed passes after which close() gives up


def check_address(tracking_uri: str) -> None:
    """Raise InputError for a tracking address that is neither a database nor a server."""
    if not re.match(r"^(sqlite|postgresql|mysql|mssql)(\+\w+)?://|^https?://", tracking_uri):
        raise InputError(
            f"MLflow tracking address {redact(tracking_uri)!r} is not supported",
            "use sqlite:///path/mlflow.db, http(s)://host:port, or a postgresql:// or mysql:// address",
        )


def prepare_mlflow(tracking_uri: str) -> None:
    """Set MLflow's environment variables for this process and its children, and create the folder of a SQLite database.

    Call it before mlflow is imported. It turns off telemetry, unpickling of models and log lines about migrations, and makes
    requests short and without retries (a repeated "create run" could create two runs). Variables that are set already are kept.
    Raises InputError for an address that is neither a database nor a server, StorageError if the folder cannot be created.
    """
    check_address(tracking_uri)
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It logs the traceback of every failed SQL statement before it raises the error, which is reported once, by our code.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    path = sqlite_path(tracking_uri)
    if path is not None:
        with disk_errors(str(path.parent)):
            path.parent.mkdir(parents=True, exist_ok=True)


def create_database(tracking_uri: str) -> None:
    """Create a SQLite database with MLflow's tables atomically if it does not exist, or update the addresses in one that was
    moved. Its owner alone can read a new one. Does nothing for other databases and servers.

    MLflow creates the tables one by one in the file itself, and cannot use a file in which that was interrupted.
    Raises StorageError if the tables cannot be created.
    """
    path = sqlite_path(tracking_uri)
    if path is None:
        return
    if path.exists():
        update_addresses(path)
        return
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with disk_errors(str(path)), lock_file(path.with_name(f".{path.name}.lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return  # another process was faster
        for leftover in path.parent.glob(f".{path.name}.*/"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            try:
                MlflowClient(f"sqlite:///{folder}/new.db").search_experiments(max_results=1)
                with closing(sqlite3.connect(f"{folder}/new.db")) as database:
                    database.execute("VACUUM INTO ?", (f"{folder}/complete.db",))
            except (sqlite3.Error, MlflowException) as error:
                raise StorageError(
                    f"{path}: MLflow's tables cannot be created ({error})",
                    "free some disk space, or give another location",
                ) from error
            os.chmod(f"{folder}/complete.db", PRIVATE)
            os.replace(f"{folder}/complete.db", path)


def sqlite_path(tracking_uri: str) -> Path | None:
    """The file of a sqlite:/// address; None for other addresses. Raises InputError for a sqlite address without a file."""
    if not tracking_uri.startswith("sqlite"):
        return None
    path = tracking_uri.split("://", 1)[1].split("?", 1)[0].removeprefix("/")
    if not path or path == ":memory:":
        raise InputError(f"MLflow tracking address {tracking_uri!r} has no file name", "use sqlite:///path/mlflow.db")
    return Path(path).absolute()


def check_exists(tracking_uri: str) -> None:
    """Raise InputError for a SQLite database that does not exist; opening it would create it."""
    path = sqlite_path(tracking_uri)
    if path is not None and not path.exists():
        raise InputError(
            f"{path}: there is no MLflow database", "check the storage and MLflow's address, or run a recipe"
        )


class Flusher:
    """Keeps an MLflow experiment up to date with a spool, from a background thread.

    spool: folder of RunLog files. tracking_uri, experiment: MLflow's address and the experiment to send them to. interval:
    seconds between passes.
    Only one Flusher sends at a time: another one on the same spool, in any process of this machine, waits until the first ends.
    The constructor raises what prepare_mlflow raises; afterwards no error of MLflow reaches the caller.
    MLflow runs that exist already, also of a driver that was killed, are found by the tag `minitron.key`, so each key of the
    spool is one MLflow run of the experiment.
    """

    def __init__(self, spool: str, tracking_uri: str, experiment: str, interval: float = 2.0) -> None:
        prepare_mlflow(tracking_uri)
        self.spool = spool_folder(spool)
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self.interval = interval
        with disk_errors(str(self.spool)):
            self.spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sender: Sender | None = None
        self._new_run_id = threading.Condition()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._abandon = threading.Event()
        self._thread = threading.Thread(target=self._work, name="minitron-mlflow", daemon=True)
        self._thread.start()

    def __enter__(self) -> Flusher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if unsent := self.close():
            log.warning("%d events in %s are not sent yet; the next run sends them", unsent, self.spool)

    def run_ids(self) -> dict[str, str]:
        """The known MLflow run ids by key."""
        return {} if self._sender is None else dict(self._sender.sent.runs)

    def wait_for(self, key: str, timeout: float) -> str | None:
        """The MLflow run id of `key`; None if MLflow has not created the run after `timeout` seconds."""
        self._wake.set()
        with self._new_run_id:
            self._new_run_id.wait_for(lambda: key in self.run_ids() or not self._thread.is_alive(), timeout)
        return self.run_ids().get(key)

    def refused(self) -> int:
        """Number of events that MLflow rejects for good, such as metrics of a deleted run; the first of each run is logged."""
        return 0 if self._sender is None else self._sender.refused

    def close(self, timeout: float = 30.0) -> int:
        """Send the remaining events, for at most `timeout` seconds; returns the number of events that are still unsent."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout)
        self._abandon.set()
        sent = self._sender.sent if self._sender is not None else Sent(self.spool / STATE)
        offsets = {key: sent.offsets.get(key, 0) for key in keys(self.spool)}
        return sum(1 for key, offset in offsets.items() for _ in read_events(self.spool / f"{key}.jsonl", offset))

    def _work(self) -> None:
        failures = 0
        with self._spool_lock() as locked:
            while locked and not self._abandon.is_set():
                last = self._closing.is_set()  # read before the pass, so that the last pass sends all earlier events
                try:
                    self._pass()
                    if failures:
                        log.warning("MLflow at %s answers again", redact(self.tracking_uri))
                    failures = 0
                except unreachable() as error:
                    failures += 1
                    if failures == 1:
                        reason = (str(error).splitlines() or [type(error).__name__])[0]
                        address = redact(self.tracking_uri)
                        log.warning("MLflow at %s: %.300s; events are kept in %s", address, redact(reason), self.spool)
                if last and (not failures or failures >= LAST_ATTEMPTS):
                    break
                pause = min(self.interval * 2**failures, LONGEST_PAUSE) if failures else self.interval
                self._wake.wait(min(pause, 0.5) if last else pause)
                self._wake.clear()
        with self._new_run_id:
            self._new_run_id.notify_all()

    def _pass(self) -> None:
        if self._sender is None:
            create_database(self.tracking_uri)
            database = sqlite_path(self.tracking_uri)
            artifacts = None if database is None else str(database.parent / ARTIFACTS)
            self._sender = Sender(
                self.spool,
                self.tracking_uri,
                self.experiment,
                artifacts=artifacts,
                stop=self._abandon.is_set,
                on_run_id=self._notify_waiting,
            )
        self._sender.send_all()

    def _notify_waiting(self) -> None:
        with self._new_run_id:
            self._new_run_id.notify_all()

    @contextmanager
    def _spool_lock(self) -> Iterator[bool]:
        """Hold the lock of the spool, which the system releases when a process is killed. Yields False after `close`."""
        with lock_file(self.spool / ".lock") as file:
            warned = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not warned:
                        log.warning("another process is sending %s to MLflow; this one waits until it ends", self.spool)
                    warned = True
                else:
                    yield True
                    return
                if self._closing.wait(0.5):
                    yield False
                    return
