"""An MLflow database that was moved or copied with the storage it lies in: its addresses follow it.

MLflow keeps absolute addresses and offers no call to change them; without this, artifacts of a moved storage can't be opened,
new ones are written where it was before, and registered models point at the old folder.
"""

from __future__ import annotations

import logging
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

    Only where the artifacts lie beside it still: a database alone, such as a backup, keeps its addresses.
    """
    here = str(database.parent)
    if not (database.parent / ARTIFACTS).is_dir():
        return
    with closing(sqlite3.connect(database, timeout=30)) as store, store:
        tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "experiments" not in tables:
            return
        locations = [place for (place,) in store.execute("SELECT artifact_location FROM experiments") if place]
        before = {place.rsplit(f"/{ARTIFACTS}/", 1)[0] for place in locations if f"/{ARTIFACTS}/" in place} - {here}
        for root in sorted(before):
            for table, column in ADDRESSES:
                if table in tables:
                    store.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                        (here, len(root) + 1, len(root) + 1, f"{root}/"),
                    )
            log.warning("%s was moved here from %s: its addresses follow", database, root)
