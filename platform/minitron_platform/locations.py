"""Where a run keeps things."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from minitron import storage


@dataclass(frozen=True)
class Locations:
    """`storage` is any fsspec path, `local` a folder on this machine for records and reports."""

    storage: str
    local: str
    tracking_uri: str

    def stage(self, name: str, fingerprint: str) -> str:
        return storage.join(self.storage, "stages", name, fingerprint)

    def run(self, run_key: str) -> str:
        return storage.join(self.storage, "runs", run_key)

    def local_run(self, run_key: str) -> str:
        """The run's folder on this machine: its record, report and logs."""
        return storage.join(self.local, "runs", run_key)

    def spool(self, run_key: str) -> str:
        return storage.join(self.local_run(run_key), "spool")


def resolve_locations(storage_path: str | None = None, tracking_uri: str | None = None) -> Locations:
    """Absolute locations from what the user gave; default: ./runs (or MINITRON_STORAGE), and SQLite inside it (or
    MLFLOW_TRACKING_URI)."""
    root = storage.absolute(storage_path or os.environ.get("MINITRON_STORAGE") or "runs")
    storage.filesystem(root)
    local = root if storage.is_local(root) else str(Path.home() / ".cache" / "minitron" / storage.fingerprint(root))
    local = str(storage.local_path(local))
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{local}/mlflow.db"
    return Locations(str(storage.local_path(root)) if storage.is_local(root) else root, local, uri)
