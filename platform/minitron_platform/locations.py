"""The locations of a run's data: storage, local folder and MLflow."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from minitron import storage
from minitron.errors import InputError
from minitron_platform.arguments import check_optional_string, path_string

NOT_IN_A_DATABASE_ADDRESS = re.compile(r"\?|%[0-9A-Fa-f]{2}")  # SQLAlchemy ends the path there, or decodes it


@dataclass(frozen=True)
class Locations:
    """Where runs keep their data."""

    storage: str
    """An absolute local path, or an fsspec address such as s3://bucket/minitron."""
    local: str
    """Folder on this machine for records, reports and logs; the storage itself if that is local."""
    tracking_uri: str
    """MLflow's."""

    @property
    def own_database(self) -> str:
        """MLflow's address if none is given: a database in the local folder."""
        return f"sqlite:///{self.local}/mlflow.db"

    @property
    def uses_own_database(self) -> bool:
        """Whether MLflow is `own_database`."""
        return self.tracking_uri == self.own_database

    def stage(self, name: str, fingerprint: str) -> str:
        """Folder of a stage's output, in the storage."""
        return storage.join(self.storage, "stages", name, fingerprint)

    def run(self, run_key: str) -> str:
        """Folder of a run's report, in the storage."""
        return storage.join(self.storage, "runs", run_key)

    def local_run(self, run_key: str) -> str:
        """Folder of a run on this machine: its records, report and logs."""
        return storage.join(self.local, "runs", run_key)

    def spool(self, run_key: str) -> str:
        """Folder of the run's records that are sent to MLflow, in the storage; see `tracking.spool`."""
        return storage.join(self.run(run_key), "spool")

    @property
    def answers(self) -> str:
        """Folder of the answers of models to benchmarks, in the storage."""
        return storage.join(self.storage, "answers")

    def older_spool(self, run_key: str) -> str:
        """Folder on this machine where earlier versions kept the run's records."""
        return storage.join(self.local_run(run_key), "spool")


def resolve_locations(storage_path: str | Path | None = None, tracking_uri: str | None = None) -> Locations:
    """Absolute locations from the user's arguments.

    storage_path: default MINITRON_STORAGE, or ./runs. tracking_uri: default MLFLOW_TRACKING_URI, or a SQLite database in the
    local folder. Raises InputError or StorageError for an address that cannot be one, or whose file system is unknown or not
    installed, and for a wrong type.
    """
    check_optional_string("tracking_uri", tracking_uri)
    if storage_path is not None:
        storage_path = path_string("storage_path", storage_path)
    given = str(storage_path or os.environ.get("MINITRON_STORAGE") or "runs")
    storage.filesystem(given)
    root = storage.absolute(given)
    local = root if storage.is_local(root) else str(Path.home() / ".cache" / "minitron" / storage.fingerprint(root))
    local = str(storage.local_path(local))
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and (match := NOT_IN_A_DATABASE_ADDRESS.search(local)):
        raise InputError(
            f"storage {local!r}: contains {match[0]!r}, which means something else in the address of MLflow's database",
            "give another folder, or the address of an MLflow server with --tracking-uri",
        )
    locations = Locations(str(storage.local_path(root)) if storage.is_local(root) else root, local, uri or "")
    return locations if uri else replace(locations, tracking_uri=locations.own_database)
