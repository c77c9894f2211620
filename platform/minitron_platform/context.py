"""What every stage works with."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron import storage
from minitron_platform.console import Console
from minitron_platform.recipe import Recipe
from minitron_platform.spool import RunLog


@dataclass(frozen=True)
class Places:
    """Where a run keeps things. `storage` is any fsspec path, `local` a folder on this machine for records and locks."""

    storage: str
    local: str
    tracking_uri: str

    def stage(self, name: str, fingerprint: str) -> str:
        return storage.join(self.storage, "stages", name, fingerprint)

    def run(self, run_key: str) -> str:
        return storage.join(self.storage, "runs", run_key)

    def local_run(self, run_key: str) -> str:
        """The run's folder on this machine: its record, report and lock."""
        return storage.join(self.local, "runs", run_key)

    def spool(self, run_key: str) -> str:
        return storage.join(self.local_run(run_key), "spool")


def places(storage_path: str | None = None, tracking_uri: str | None = None) -> Places:
    """Absolute places from what the user gave; default: ./runs (or MINITRON_STORAGE), and SQLite inside it (or
    MLFLOW_TRACKING_URI)."""
    root = storage.absolute(storage_path or os.environ.get("MINITRON_STORAGE") or "runs")
    storage.filesystem(root)
    local = root if storage.is_local(root) else str(Path.home() / ".cache" / "minitron" / storage.fingerprint(root))
    local = str(storage.local_path(local))
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{local}/mlflow.db"
    return Places(str(storage.local_path(root)) if storage.is_local(root) else root, local, uri)


@dataclass
class Context:
    """One run of a recipe, while it runs."""

    recipe: Recipe
    places: Places
    console: Console
    run_key: str
    need_ray: Callable[[], None]  # starts or joins Ray once, when the first stage needs it
    mlflow_run: Callable[[str], str | None]  # the MLflow run of a record's key, once it is known
    done: dict[str, dict[str, Any]] = field(default_factory=dict)  # outputs of finished stages, by name

    def log(self, part: str) -> RunLog:
        """The record of a stage, or of a search's trial, under this run."""
        return RunLog(self.places.spool(self.run_key), f"{self.run_key}.{part}")
