"""What would keep a run's results out of MLflow at its end, found before it starts."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from minitron.environment import environment_variables
from minitron.errors import InputError
from minitron_platform.tracking.flusher import create_database, prepare_mlflow, redact, sqlite_path
from minitron_platform.tracking.sender import check_not_deleted

TIMEOUT = "10"  # seconds that a server may take to answer
DRIVERS = {
    "psycopg": "'psycopg[binary]'",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "pymysql": "pymysql",
    "pyodbc": "pyodbc",
}


def check_tracking(tracking_uri: str, experiment: str) -> str | None:
    """A warning where MLflow does not answer now, which costs nothing if it does before the run ends; else None.

    Raises InputError for what won't come right by itself: an unknown kind of address, a database driver that is not
    installed, a file that is no database, tables of another version of MLflow, a password that is refused, an experiment that
    was deleted. A SQLite file that is not there yet is made when it is needed; of it nothing is looked at.
    """
    prepare_mlflow(tracking_uri)
    database = sqlite_path(tracking_uri)
    if database is not None and not database.exists():
        return None
    try:
        check_database(tracking_uri)
    except ConnectionError as error:
        return _away(tracking_uri, error)
    create_database(tracking_uri)
    return _ask(tracking_uri, experiment)


def check_database(tracking_uri: str) -> None:
    """Open the database that an address names, if it is one and there; of a server nothing is asked.

    Raises InputError for one that can't be opened, and ConnectionError where nothing answers.
    """
    database = sqlite_path(tracking_uri)
    if database is None:
        if not tracking_uri.startswith("http"):
            _connect(tracking_uri)
    elif database.exists():
        _check_file(database)


def _check_file(database: Path) -> None:
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=rw", uri=True)) as store:
            store.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.DatabaseError as error:
        raise InputError(
            f"MLflow's database {database} can't be opened ({error})",
            "check its permissions, give another with --tracking-uri, or move it away to begin a new one",
        ) from error


def _connect(tracking_uri: str) -> None:
    """Connect once; MLflow itself would try again for minutes. Raises ConnectionError where nothing answers."""
    import sqlalchemy

    arguments = {"connect_timeout": int(TIMEOUT)} if tracking_uri.startswith(("postgresql", "mysql")) else {}
    try:
        with closing(sqlalchemy.create_engine(tracking_uri, connect_args=arguments).connect()):
            pass
    except ModuleNotFoundError as error:
        package = DRIVERS.get(error.name or "", error.name)
        raise InputError(
            f"--tracking-uri {redact(tracking_uri)}: the Python package {error.name} is not installed",
            f"pip install {package}",
        ) from error
    except sqlalchemy.exc.NoSuchModuleError as error:
        raise InputError(
            f"--tracking-uri {redact(tracking_uri)}: {error}", "use postgresql://, mysql+pymysql:// or sqlite:///"
        ) from error
    except sqlalchemy.exc.OperationalError as error:
        reason = str(error.orig)
        if any(word in reason.lower() for word in ("password", "access denied", "authentication", "does not exist")):
            raise InputError(
                f"MLflow's database {redact(tracking_uri)} refuses the connection: {_line(reason)}",
                "check the user, password and name of the database in --tracking-uri",
            ) from error
        raise ConnectionError(_line(reason)) from error


def _ask(tracking_uri: str, experiment: str) -> str | None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        with environment_variables({"MLFLOW_HTTP_REQUEST_TIMEOUT": TIMEOUT}):
            client = MlflowClient(tracking_uri, registry_uri=tracking_uri)
            found = client.get_experiment_by_name(experiment)
    except MlflowException as error:
        reason = _line(str(error))
        if "database schema" in reason:
            raise InputError(
                f"MLflow's database {redact(tracking_uri)} has tables of another version of MLflow",
                f"copy it, then: mlflow db upgrade {redact(tracking_uri)}",
            ) from error
        if error.error_code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or "401" in reason or "403" in reason:
            raise InputError(
                f"MLflow at {redact(tracking_uri)} refuses this user: {redact(reason)}",
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
            ) from error
        return _away(tracking_uri, error)
    if found is not None:
        check_not_deleted(found)
    return None


def _away(tracking_uri: str, error: Exception) -> str:
    return (
        f"MLflow at {redact(tracking_uri)} does not answer ({redact(_line(str(error)))}): records wait on this machine, "
        "and the model can't be registered before it does"
    )


def _line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0][:300]
