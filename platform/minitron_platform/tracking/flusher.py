"""Sends a run's records to MLflow in the background, without delaying the run.

`Flusher` runs the passes of sender.py in a thread of the driver. If the tracking server is down, slow or full, the run
continues and no metric is lost: events that are not sent stay in the spool, in the storage, until the next pass or run.
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
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import TracebackType

from minitron.errors import InputError, StorageError
from minitron.storage import PRIVATE, disk_errors, lock_file, redact
from minitron_platform.fence import LeaseLostError
from minitron_platform.tracking.mlflow_runs import AnsweredClient
from minitron_platform.tracking.moved_database import ARTIFACTS, artifact_folder, update_addresses
from minitron_platform.tracking.sender import Sender, count_events, unreachable
from minitron_platform.tracking.sent import known_offsets
from minitron_platform.tracking.spool import Spool

log = logging.getLogger(__name__)

LONGEST_PAUSE = 60.0  # seconds between attempts when MLflow does not answer
LAST_ATTEMPTS = 8  # consecutive passes without any answer after which close() gives up
LAST_PAUSE = 3.0  # longest pause between those passes, in seconds
PATIENCE = 60.0  # seconds without any accepted record after which close() gives up
STOP_PATIENCE = 5.0  # the same if the user has stopped the run


def check_address(tracking_uri: str) -> None:
    """Raise InputError for a tracking address that is neither a database nor a server."""
    if not re.match(r"^(sqlite|postgresql|mysql|mssql)(\+\w+)?://|^https?://", tracking_uri):
        raise InputError(
            f"MLflow tracking address {redact(tracking_uri)!r} is not supported",
            "use sqlite:///path/mlflow.db, http(s)://host:port, or a postgresql:// or mysql:// address",
        )


def prepare_mlflow(tracking_uri: str) -> None:
    """As `configure_mlflow`, and create the folder of a SQLite database. Raises StorageError if it cannot be created."""
    configure_mlflow(tracking_uri)
    path = sqlite_path(tracking_uri)
    if path is not None:
        with disk_errors(str(path.parent)):
            path.parent.mkdir(parents=True, exist_ok=True)


def configure_mlflow(tracking_uri: str) -> None:
    """Set MLflow's environment variables for this process and its children.

    Call it before mlflow is imported. It turns off telemetry, unpickling of models and log lines about migrations, and makes
    requests short and without retries (a repeated "create run" could create two runs). Variables that are set already are kept.
    Raises InputError for an address that is neither a database nor a server.
    """
    check_address(tracking_uri)
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It logs the traceback of every failed SQL statement before it raises the error, which is reported once, by our code.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


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
                with closing(sqlite3.connect(f"{folder}/new.db", isolation_level=None)) as database:
                    # MLflow's is the folder mlruns of whatever directory this process was started in
                    default = str(path.parent / ARTIFACTS / artifact_folder("Default"))
                    database.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0", (default,))
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

    tracking_uri, experiment: MLflow's address, and the experiment that gets the records. interval: seconds between passes.
    Only the process that may write to the spool may send it: the driver that holds the run's lease.
    No error of MLflow reaches the caller. MLflow runs that exist already, also of a driver that was killed, are found by their
    tag `minitron.key`, so each key of the spool is one MLflow run of the experiment.
    """

    def __init__(self, spool: Spool, tracking_uri: str, experiment: str, interval: float = 2.0) -> None:
        self.spool = spool
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self.interval = interval
        self._client: AnsweredClient | None = None
        self._sender: Sender | None = None
        self._left = 0  # events to send when close() began
        self._wanted: set[str] = set()  # keys whose runs wait_for() waits for
        self.on_unsent: Callable[[int], None] = lambda number: None  # called after each pass with what MLflow lacks
        self._new_run_id = threading.Condition()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._abandon = threading.Event()
        self._thread = threading.Thread(target=self._work, name="minitron-mlflow", daemon=True)
        spool.on_durable = self._wake.set
        self._thread.start()

    def __enter__(self) -> Flusher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        patience = STOP_PATIENCE if isinstance(error, KeyboardInterrupt | SystemExit) else PATIENCE
        if unsent := self.close(0 if isinstance(error, LeaseLostError) else patience):
            log.warning(
                "%s not in MLflow yet, but in %s: `minitron sync` or the next run sends the rest, from any machine",
                "1 record is" if unsent == 1 else f"{unsent:,} records are",
                self.spool.folder,
            )

    def run_ids(self) -> dict[str, str]:
        """The known MLflow run ids by key."""
        return {} if self._sender is None else dict(self._sender.runs.ids)

    def wait_for(self, key: str, timeout: float) -> str | None:
        """The MLflow run id of `key`; None if MLflow has accepted nothing for `timeout` seconds, or has no such run."""
        self.spool.flush()
        self._wanted.add(key)
        self._wake.set()
        with self._new_run_id:
            accepted = -1
            while accepted != self._accepted():  # a slow server is waited for
                accepted = self._accepted()
                if self._new_run_id.wait_for(lambda: key in self.run_ids() or not self._thread.is_alive(), timeout):
                    break
        return self.run_ids().get(key)

    def refused(self) -> int:
        """Number of events that MLflow rejects for good, such as metrics of a deleted run; the first of each run is logged."""
        return 0 if self._sender is None else self._sender.refused

    def sent(self) -> int:
        """Number of events that this process has sent."""
        return 0 if self._sender is None else self._sender.finished

    def text(self) -> str:
        """What is left to be sent, for a status line while closing."""
        finished = 0 if self._sender is None else self._sender.finished
        left = self._left - finished
        return f"{left:,} records to MLflow at {redact(self.tracking_uri)}" if left > 0 else ""

    def close(self, patience: float = PATIENCE) -> int:
        """Send the remaining events; returns the number of events that are still unsent.

        Waits as long as MLflow accepts something every `patience` seconds.
        """
        self.spool.flush()
        self._left = self._unsent() + (0 if self._sender is None else self._sender.finished)
        self._closing.set()
        self._wake.set()
        accepted, since = self._accepted(), time.monotonic()
        try:
            while self._thread.is_alive() and time.monotonic() - since < patience:
                self._thread.join(0.1)
                if self._accepted() != accepted:
                    accepted, since = self._accepted(), time.monotonic()
        finally:
            self._abandon.set()
        return self._unsent()

    def _accepted(self) -> int:
        """Number of requests that MLflow has accepted."""
        return 0 if self._sender is None else self._sender.accepted

    def _answered(self) -> int:
        """Number of requests that MLflow has answered."""
        return 0 if self._client is None else self._client.answered

    def _unsent(self) -> int:
        if self._sender is not None:
            return self._sender.unsent()
        return count_events(self.spool, known_offsets(self.spool.folder))

    def _work(self) -> None:
        failures = 0
        while not self._abandon.is_set():
            last = self._closing.is_set()  # read before the pass, so that the last pass sends all earlier events
            answered = self._answered()
            try:
                self._pass(last)
                if failures:
                    log.warning("MLflow at %s answers again", redact(self.tracking_uri))
                failures = 0
            except unreachable() as error:
                if not failures:
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    address = redact(self.tracking_uri)
                    log.warning(
                        "MLflow at %s: %.300s; records are kept in %s", address, redact(reason), self.spool.folder
                    )
                failures = 1 if self._answered() > answered else failures + 1
            self.on_unsent(self._unsent())
            if last and (not failures or failures >= LAST_ATTEMPTS):
                break
            pause = min(self.interval * 2**failures, LONGEST_PAUSE) if failures else self.interval
            if failures:
                self._closing.wait(pause) if not last else self._abandon.wait(min(pause, LAST_PAUSE))
            else:
                self._wake.wait(pause)
                self._wake.clear()
        self._notify_waiting()

    def _pass(self, last: bool) -> None:
        if self._sender is None:
            if not self._wanted and not self._unsent():
                return  # MLflow's import takes seconds
            prepare_mlflow(self.tracking_uri)
            create_database(self.tracking_uri)
            self._client = self._client or AnsweredClient(self.tracking_uri)
            database = sqlite_path(self.tracking_uri)
            artifacts = None if database is None else str(database.parent / ARTIFACTS)
            self._sender = Sender(
                self.spool,
                self._client,
                self.tracking_uri,
                self.experiment,
                artifacts=artifacts,
                stop=self._abandon.is_set,
                on_run_id=self._notify_waiting,
            )
        self._sender.send_all()
        for key in list(self._wanted):
            self._sender.runs.find(key)
            self._wanted.discard(key)
        self._notify_waiting()
        if last:
            self._sender.sent.save()

    def _notify_waiting(self) -> None:
        with self._new_run_id:
            self._new_run_id.notify_all()
