"""Checks, before a run starts, that MLflow will accept its results."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from minitron.environment import environment_variables
from minitron.errors import InputError, StorageError
from minitron.storage import check_local_folder, redact
from minitron_platform.tracking.flusher import configure_mlflow, create_database, sqlite_path
from minitron_platform.tracking.mlflow_runs import check_not_deleted

TIMEOUT = "10"  # seconds to wait for an answer of the server
LOCK_SECONDS = 10.0  # to wait for another process that writes to a SQLite database
REMEDIES = {  # for a database driver that is not installed, by its module
    "psycopg": "pip install 'minitron[postgres]'",
    "psycopg2": "pip install 'minitron[postgres]', and write postgresql+psycopg:// in the address",
    "MySQLdb": "pip install pymysql, and write mysql+pymysql:// in the address",
}
REFUSED = re.compile(r"(?<![\d:])40[13]\b")  # an HTTP status, and not a port or a part of one
CONSEQUENCE = "records and finished models wait in the storage until `minitron sync` or the next run sends them"
REQUIRED = "required"
BEST_EFFORT = "best-effort"


def check_tracking(tracking_uri: str, experiment: str, policy: str | None = None) -> str | None:
    """Check MLflow's server or database. Returns a warning if there is a problem that the run can go on with, otherwise None.

    policy: None goes on if MLflow does not answer, because it only has to answer by the end of the run, and refuses what the
    user must fix: an unsupported kind of address, a database driver that is not installed, a file that is not a database,
    tables of another version of MLflow, a refused password, a deleted experiment, a SQLite file that cannot be written, or
    not be created, by this user. "required" refuses both, "best-effort" goes on with both.
    Raises InputError or StorageError for what is refused. A SQLite file that does not exist yet is created by the run.
    """
    try:
        problem = _problem(tracking_uri, experiment)
    except (InputError, StorageError) as error:
        if policy != BEST_EFFORT:
            raise
        return f"{error.problem}: {CONSEQUENCE}. To fix it: {error.remedy}"
    if problem is None:
        return None
    if policy == REQUIRED:
        raise InputError(problem, "start it or correct its address, or leave out `tracking: required`")
    return f"{problem}: {CONSEQUENCE}"


def check_accepts(tracking_uri: str, experiment: str) -> None:
    """Raise InputError or StorageError if MLflow's server or database does not answer, or for what `check_tracking` refuses."""
    if problem := _problem(tracking_uri, experiment):
        raise InputError(problem, "start it or correct its address")


def _problem(tracking_uri: str, experiment: str) -> str | None:
    """The problem if MLflow does not answer, None if everything is well; raises InputError for what the user must fix."""
    configure_mlflow(tracking_uri)
    database = sqlite_path(tracking_uri)
    if database is not None and not database.exists():
        _check_new(database)
        return None
    try:
        check_database(tracking_uri)
        if database is not None:
            _check_file(database, write=True)
    except ConnectionError as error:
        return _no_answer(tracking_uri, _first_line(str(error)))
    create_database(tracking_uri)
    return _check_experiment(tracking_uri, experiment)


def check_database(tracking_uri: str) -> None:
    """Open the database at `tracking_uri`; does nothing for a server, or a SQLite file that does not exist.

    Raises InputError for a database that cannot be opened, ConnectionError if it does not answer.
    """
    database = sqlite_path(tracking_uri)
    if database is None:
        if not tracking_uri.startswith("http"):
            _connect(tracking_uri)
    elif database.exists():
        _check_file(database)


def _check_new(database: Path) -> None:
    """Raise InputError for a file that cannot be created; nothing is left of the try."""
    try:
        check_local_folder(database.parent)
    except OSError as error:
        raise InputError(
            f"MLflow's database {database} cannot be created ({error.strerror})",
            f"check the permissions of {database.parent}, or give another place with --tracking-uri",
        ) from error


def _check_file(database: Path, *, write: bool = False) -> None:
    """Raise InputError for a file that is not a database, ConnectionError for one that is locked. write: whether it must accept
    changes too: SQLite opens one that this user may only read without an error."""
    try:
        address = f"file:{quote(str(database))}?mode=rw"
        with closing(sqlite3.connect(address, uri=True, timeout=LOCK_SECONDS, isolation_level=None)) as store:
            store.execute("SELECT count(*) FROM sqlite_master")
            if write:
                store.execute("BEGIN IMMEDIATE")
                store.execute("CREATE TABLE minitron_check (number)")  # SQLite writes into the folder, too
                store.execute("ROLLBACK")
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
            raise ConnectionError(f"{database} is locked by another process") from error
        raise InputError(
            f"MLflow's database {database} cannot be {'written' if write else 'opened'} ({error})",
            "check its permissions, give another one with --tracking-uri, or move it elsewhere to start with a new one",
        ) from error


def _connect(tracking_uri: str) -> None:
    """Connect once; MLflow itself would retry for minutes. Raises ConnectionError if the database does not answer."""
    import sqlalchemy

    arguments = {"connect_timeout": int(TIMEOUT)} if tracking_uri.startswith(("postgresql", "mysql")) else {}
    try:
        with closing(sqlalchemy.create_engine(tracking_uri, connect_args=arguments).connect()):
            pass
    except ModuleNotFoundError as error:
        raise InputError(
            f"--tracking-uri {redact(tracking_uri)}: the Python package {error.name} is not installed",
            REMEDIES.get(error.name or "", f"pip install {error.name}"),
        ) from error
    except sqlalchemy.exc.NoSuchModuleError as error:
        raise InputError(
            f"--tracking-uri {redact(tracking_uri)}: {error}", "use postgresql://, mysql+pymysql:// or sqlite:///"
        ) from error
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        raise InputError(
            f"--tracking-uri {redact(tracking_uri)}: not an address of a database",
            "use postgresql://HOST:PORT/NAME, with USER:PASSWORD@ before HOST if the server asks for them",
        ) from error
    except sqlalchemy.exc.OperationalError as error:
        reason = str(error.orig)
        if any(word in reason.lower() for word in ("password", "access denied", "authentication", "does not exist")):
            raise InputError(
                f"MLflow's database {redact(tracking_uri)} refuses the connection: {_first_line(reason)}",
                "check the user, the password and the name of the database in --tracking-uri",
            ) from error
        raise ConnectionError(_first_line(reason)) from error


def _check_experiment(tracking_uri: str, experiment: str) -> str | None:
    """Look the experiment up. Returns a warning if MLflow does not answer; raises InputError as `check_tracking` does."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        with environment_variables({"MLFLOW_HTTP_REQUEST_TIMEOUT": TIMEOUT}):
            client = MlflowClient(tracking_uri, registry_uri=tracking_uri)
            existing = client.get_experiment_by_name(experiment)
    except MlflowException as error:
        reason = _first_line(str(error))
        if "database schema" in reason:
            raise InputError(
                f"MLflow's database {redact(tracking_uri)} has tables of another version of MLflow",
                f"make a copy of it, then run: mlflow db upgrade {redact(tracking_uri)}",
            ) from error
        if error.error_code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or REFUSED.search(reason):
            raise InputError(
                f"MLflow at {redact(tracking_uri)} refuses this user: {redact(reason)}",
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
            ) from error
        return _no_answer(tracking_uri, _first_cause(error))
    if existing is not None:
        check_not_deleted(existing)
    return None


def _no_answer(tracking_uri: str, reason: str) -> str:
    return f"MLflow at {redact(tracking_uri)} does not answer ({redact(reason)})"


def _first_cause(error: BaseException) -> str:
    """What the HTTP library below MLflow has met."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return (isinstance(error, OSError) and error.strerror) or _first_line(str(error))


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0][:300]
