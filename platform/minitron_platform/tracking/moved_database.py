"""Updates the addresses in an MLflow database that was moved or copied together with its storage.

MLflow stores absolute addresses and has no call to change them. Without an update, the artifacts of a moved storage cannot be
opened, new ones are written to the old folder, and registered models point to it.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path

from minitron.errors import StorageError

log = logging.getLogger(__name__)

ARTIFACTS = "artifacts"  # folder beside our databases for the artifacts of new experiments
ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def update_addresses(database: Path) -> None:
    """Update the addresses in a SQLite database that was in another folder before, in one transaction.

    Nothing is changed unless the artifacts are beside the database; a copy of the database alone, such as a backup, keeps its
    addresses. The former folder is known from experiments whose artifacts were moved with the database. Addresses outside that
    folder do not change, nor those of files that were not moved. A database that this user can only read is read as it is.
    Raises StorageError for one that cannot be updated for another reason, such as a full disk or a lock.
    """
    try:
        _update(database)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_READONLY:  # the low byte; the others say why
            log.warning("%s was moved, and cannot be written: it has addresses in the former folder", database)
            return
        raise StorageError(
            f"{database} was moved, and the addresses in it cannot be updated ({error})",
            "free some disk space, or end what is using it, and run the command again",
        ) from error


def _update(database: Path) -> None:
    here = str(database.parent)
    if not (database.parent / ARTIFACTS).is_dir():
        return
    with closing(sqlite3.connect(database, timeout=30)) as store, store:
        tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "experiments" not in tables:
            return
        # not of MLflow's own experiment `Default`, which says nothing before there is another one
        own = "SELECT name, artifact_location FROM experiments WHERE experiment_id <> 0"
        experiments = store.execute(own).fetchall()
        former_folders = {old for name, address in experiments if (old := _former_folder(here, name, address))}
        for old in sorted(former_folders):
            if old == here or _is_same_folder(old, here):
                continue
            for table, column in ADDRESSES:
                if table not in tables:
                    continue
                addresses = store.execute(
                    f"SELECT DISTINCT {column} FROM {table} WHERE substr({column}, 1, ?) = ?", (len(old) + 1, f"{old}/")
                ).fetchall()
                for (address,) in addresses:
                    moved = here + address.removeprefix(old)
                    if os.path.exists(moved) or not os.path.exists(address):
                        store.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (moved, address))
            log.warning("%s was moved here from %s; the addresses in it were updated", database, old)


def _former_folder(here: str, experiment: str, address: str | None) -> str | None:
    """The folder of a database, which is now in `here`, at the time when `experiment` was created in it.

    address: the experiment's artifact location. None if it was not created by Minitron: its artifacts have another folder name,
    and are not in `here`.
    """
    folder, separator, name = (address or "").rpartition(f"/{ARTIFACTS}/")
    ours = name == artifact_folder(experiment) or os.path.isdir(os.path.join(here, ARTIFACTS, name))
    return folder if separator and folder.startswith("/") and ours else None


def _is_same_folder(first: str, second: str) -> bool:
    """Whether two paths lead to the same folder, for example through a link."""
    return os.path.exists(first) and os.path.samefile(first, second)


def artifact_folder(experiment: str) -> str:
    """Name of the folder for the artifacts of an experiment."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", experiment)
