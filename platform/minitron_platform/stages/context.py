"""What every stage works with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron import storage
from minitron_platform.console import Console
from minitron_platform.fence import Fence
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.recipes.schema import Member, Recipe
from minitron_platform.tracking.spool import RunLog


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
    start_ray: Callable[[Context], ResolvedResources]  # or joins it, once
    mlflow_run: Callable[[str], str | None]  # the MLflow run of a record's key, once it is known
    shared: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # outputs of the stages that all models share, by name
    family: dict[str, dict[str, dict[str, Any]]] = field(
        default_factory=dict
    )  # of each model's own stages, by its name
    held: list[Fence] = field(default_factory=list)  # leases of the run, the stage and what else is held now
    current: Member | None = None  # the model of the family whose stages are being done

    @property
    def member(self) -> Member:
        """The model of the family whose stages are being done."""
        assert self.current is not None
        return self.current

    @property
    def done(self) -> dict[str, dict[str, Any]]:
        """Outputs of the finished stages that the current one can see, by name."""
        return {**self.shared, **self.family.get(self.current.model, {})} if self.current else dict(self.shared)

    def need_ray(self) -> ResolvedResources:
        """Have Ray, from the first stage on that needs it; what trials and workers take there."""
        return self.start_ray(self)

    def finish(self, name: str, outputs: dict[str, Any]) -> None:
        """Take in a finished stage's outputs."""
        if self.current is None:
            self.shared[name] = outputs
        else:
            self.family.setdefault(self.current.model, {})[name] = outputs

    @property
    def base(self) -> dict[str, Any]:
        """The model that the current one is cut from: `folder`, `id` and `architecture`. It is the teacher, corrected where
        that was asked for, or the finished student before it in the family."""
        if before := self.recipe.origin(self.member):
            student = self.family[before.model]["distill"]
            return {"folder": student["student"], "id": student["id"], "architecture": student["architecture"]}
        return {**self.shared["correct"], "architecture": self.shared["teacher"]["architecture"]}

    @contextmanager
    def lease(self, name: str, what: str) -> Iterator[None]:
        """Hold a part of the work that other runs may share; see `minitron_platform.leases`."""
        from minitron_platform.leases import lease

        # an earlier driver of this run may hold it still, but has lost the run
        earlier = "its run was taken over"
        with lease(self.places, name, what, run=self.run_key, console=self.console, take_over=earlier) as fence:
            self.held.append(fence)
            try:
                yield
            finally:
                self.held.remove(fence)

    def check_fences(self) -> None:
        """Raise LeaseLostError if anything that is held was taken over by another driver."""
        for fence in self.held:
            fence.check()

    def title(self, name: str) -> str:
        """What a stage or trial is called where several models have one of that name."""
        return f"{name} {self.current.model}" if self.current and len(self.recipe.family) > 1 else name

    def log(self, part: str) -> RunLog:
        """The record of a stage, or of a search's trial, under this run."""
        place = f"{self.current.model}." if self.current and len(self.recipe.family) > 1 else ""
        return RunLog(self.places.spool(self.run_key), f"{self.run_key}.{place}{part}")
