"""An MLflow database that was moved or copied with the storage it lies in: its addresses follow it.

MLflow keeps absolute addresses and offers no call to change them; without this, artifacts of a moved storage can't be opened,
new ones are written where it was before, and registered models point at the old folder.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path

log = logging.getLogger(__name__)

ARTIFACTS = "artifacts"  # the folder beside a database of ours that new experiments keep their artifacts in
ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def follow(database: Path) -> None:
    """Rewrite the addresses of a SQLite store that lay in another folder before, in one transaction.

    Only where the artifacts lie beside it still: a database alone, such as a backup, keeps its addresses. Where it lay is known
    from experiments whose artifacts came with it; what others keep in the same database stays, and so does what has not moved.
    """
    here = str(database.parent)
    if not (database.parent / ARTIFACTS).is_dir():
        return
    with closing(sqlite3.connect(database, timeout=30)) as store, store:
        tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "experiments" not in tables:
            return
        experiments = store.execute("SELECT name, artifact_location FROM experiments").fetchall()
        for root in sorted({root for name, address in experiments if (root := _root(here, name, address))}):
            if root == here or _is_same(root, here):
                continue
            for table, column in ADDRESSES:
                if table not in tables:
                    continue
                below = f"substr({column}, 1, ?) = ?", (len(root) + 1, f"{root}/")
                found = store.execute(f"SELECT DISTINCT {column} FROM {table} WHERE {below[0]}", below[1]).fetchall()
                for (address,) in found:
                    moved = here + address.removeprefix(root)
                    if os.path.exists(moved) or not os.path.exists(address):
                        store.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (moved, address))
            log.warning("%s was moved here from %s: its addresses follow", database, root)


def _root(here: str, experiment: str, address: str | None) -> str | None:
    """Where a database now in the folder `here` lay when an experiment was made in it; None for experiments of others, which
    are neither named as Minitron does it nor have artifacts here."""
    root, found, below = (address or "").rpartition(f"/{ARTIFACTS}/")
    ours = below == artifact_folder(experiment) or os.path.isdir(os.path.join(here, ARTIFACTS, below))
    return root if found and root.startswith("/") and ours else None


def _is_same(first: str, second: str) -> bool:
    """Whether two paths are of one folder, as through a link."""
    return os.path.exists(first) and os.path.samefile(first, second)


def artifact_folder(experiment: str) -> str:
    """The name of the folder of an experiment's artifacts."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", experiment)
