"""MLflow in the background: it is kept up to date with the spool and never in the way of the work.

`Flusher` runs sender.py's passes in a thread of the driver. A tracking server that is down, slow or full costs no step
and no metric: what it does not take waits in the spool, on disk, for the next pass or the next run.
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
from minitron.storage import disk_errors
from minitron_platform.tracking.moved_database import ARTIFACTS, follow
from minitron_platform.tracking.sender import STATE, Sender, Sent, unreachable
from minitron_platform.tracking.spool import keys, read_events, spool_folder

log = logging.getLogger(__name__)

LONGEST_PAUSE = 60.0  # seconds between attempts when MLflow does not answer
LAST_ATTEMPTS = 3  # failed passes in a row after which close() gives up


def prepare_mlflow(tracking_uri: str) -> None:
    """Set MLflow's environment for this process and its children, and create the folder of a SQLite store.

    Call it before mlflow is imported. Variables that are already set are kept: no telemetry, no unpickling of models,
    short requests without hidden repeats (a repeated "create run" would make two), no migration logs.
    Raises InputError for a tracking address that is neither a database nor a server, StorageError where the folder
    cannot be made.
    """
    if not re.match(r"^(sqlite|postgresql|mysql|mssql)(\+\w+)?://|^https?://", tracking_uri):
        raise InputError(
            f"MLflow tracking address {redact(tracking_uri)!r} is not supported",
            "use sqlite:///path/mlflow.db, http(s)://host:port, or a postgresql:// or mysql:// address",
        )
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
    # It prints the stack of every SQL statement that fails and then raises; what is raised is reported once, by us.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    path = sqlite_path(tracking_uri)
    if path is not None:
        with disk_errors(str(path.parent)):
            path.parent.mkdir(parents=True, exist_ok=True)


def create_database(tracking_uri: str) -> None:
    """Make the tables of a SQLite store that does not exist yet, whole or not at all; one that was moved is brought up to
    date.

    MLflow makes them one after the other in the file itself, and a file with half of them is of no use any more.
    """
    path = sqlite_path(tracking_uri)
    if path is None:
        return
    if path.exists():
        follow(path)
        return
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with disk_errors(str(path)), open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return  # another process was faster
        for left in path.parent.glob(f".{path.name}.*/"):  # by one that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            try:
                MlflowClient(f"sqlite:///{folder}/made.db").search_experiments(max_results=1)
                with closing(sqlite3.connect(f"{folder}/made.db")) as made:
                    made.execute("VACUUM INTO ?", (f"{folder}/whole.db",))
            except (sqlite3.Error, MlflowException) as error:
                raise StorageError(
                    f"{path}: MLflow's tables cannot be made there ({error})", "free some space, or name another place"
                ) from error
            os.replace(f"{folder}/whole.db", path)


def redact(tracking_uri: str) -> str:
    """The address without a user and password that it may contain, for messages."""
    return re.sub(r"://[^/@]*@", "://", tracking_uri)


def sqlite_path(tracking_uri: str) -> Path | None:
    """The file of a sqlite:/// address, None for any other. Raises InputError where the address names no file."""
    if not tracking_uri.startswith("sqlite"):
        return None
    path = tracking_uri.split("://", 1)[1].split("?", 1)[0].removeprefix("/")
    if not path or path == ":memory:":
        raise InputError(f"MLflow tracking address {tracking_uri!r} names no file", "use sqlite:///path/mlflow.db")
    return Path(path).absolute()


class Flusher:
    """Keeps an MLflow experiment up to date with a spool, from a background thread.

    spool: folder of RunLog files; tracking_uri, experiment: where they go; interval: seconds between passes.
    One Flusher sends at a time: a second one on the same spool, in any process of the node, waits for the first to end.
    Raises only what prepare_mlflow raises; afterwards nothing that MLflow does or does not do reaches the caller.
    A run made earlier, by this driver or one that was killed, is found again by the tag `minitron.key`, so a key names
    one run of its experiment.
    """

    def __init__(self, spool: str, tracking_uri: str, experiment: str, interval: float = 2.0) -> None:
        prepare_mlflow(tracking_uri)
        self.spool = spool_folder(spool)
        self.tracking_uri, self.experiment, self.interval = tracking_uri, experiment, interval
        with disk_errors(str(self.spool)):
            self.spool.mkdir(parents=True, exist_ok=True)
        self._sender: Sender | None = None
        self._opened = threading.Condition()
        self._wake, self._closing, self._abandon = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="minitron-mlflow", daemon=True)
        self._thread.start()

    def __enter__(self) -> Flusher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if unsent := self.close():
            log.warning("%d events wait in %s; they are sent at the next run", unsent, self.spool)

    def run_ids(self) -> dict[str, str]:
        """MLflow run ids known so far, by key."""
        return {} if self._sender is None else dict(self._sender.sent.runs)

    def wait_for(self, key: str, timeout: float) -> str | None:
        """The MLflow run id of `key`; None if MLflow has not made it after `timeout` seconds."""
        self._wake.set()
        with self._opened:
            self._opened.wait_for(lambda: key in self.run_ids() or not self._thread.is_alive(), timeout)
        return self.run_ids().get(key)

    def refused(self) -> int:
        """Events that MLflow will never take, such as metrics of a run deleted there; the first of a run is logged."""
        return 0 if self._sender is None else self._sender.refused

    def close(self, timeout: float = 30.0) -> int:
        """Send what is left, for at most `timeout` seconds, and return the number of events that are still unsent."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout)
        self._abandon.set()
        sent = self._sender.sent if self._sender is not None else Sent(self.spool / STATE)
        offsets = {key: sent.offsets.get(key, 0) for key in keys(self.spool)}
        return sum(1 for key, offset in offsets.items() for _ in read_events(self.spool / f"{key}.jsonl", offset))

    def _work(self) -> None:
        failures = 0
        with self._alone() as alone:
            while alone and not self._abandon.is_set():
                last = (
                    self._closing.is_set()
                )  # asked before the pass, which then sees all that was written before close()
                try:
                    self._pass()
                    if failures:
                        log.warning("MLflow at %s answers again", redact(self.tracking_uri))
                    failures = 0
                except unreachable() as error:
                    failures += 1
                    if failures == 1:
                        reason = (str(error).splitlines() or [type(error).__name__])[0]
                        where = redact(self.tracking_uri)
                        log.warning("MLflow at %s: %.300s; events wait in %s", where, redact(reason), self.spool)
                if last and (not failures or failures >= LAST_ATTEMPTS):
                    break
                pause = min(self.interval * 2**failures, LONGEST_PAUSE) if failures else self.interval
                self._wake.wait(min(pause, 0.5) if last else pause)
                self._wake.clear()
        with self._opened:
            self._opened.notify_all()

    def _pass(self) -> None:
        if self._sender is None:
            create_database(self.tracking_uri)
            database = sqlite_path(self.tracking_uri)
            artifacts = None if database is None else str(database.parent / ARTIFACTS)
            stop, opened = self._abandon.is_set, self._announce
            self._sender = Sender(
                self.spool, self.tracking_uri, self.experiment, artifacts=artifacts, stop=stop, opened=opened
            )
        self._sender.send_all()

    def _announce(self) -> None:
        with self._opened:
            self._opened.notify_all()

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Hold the spool's lock, which the system frees when a driver is killed; yields False if closed before."""
        with open(self.spool / ".lock", "w") as file:
            warned = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not warned:
                        log.warning("another process sends %s; this one waits for it to end", self.spool)
                    warned = True
                else:
                    yield True
                    return
                if self._closing.wait(0.5):
                    yield False
                    return
