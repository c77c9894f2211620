"""What a stage works with while it runs: the run's state, and the services of the process that carries it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from minitron_platform.console import Console
from minitron_platform.fence import Fence
from minitron_platform.leases import lease
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.stages.state import RunState
from minitron_platform.tracking.spool import RunLog


@dataclass(kw_only=True)
class Context(RunState):
    """One run of a recipe, while it runs."""

    console: Console
    start_ray: Callable[[Context], ResolvedResources]
    """Starts Ray or joins a cluster, once."""
    mlflow_run_id: Callable[[str], str | None]
    """The ID of the MLflow run of a record's key, once it is known."""
    held: list[Fence] = field(default_factory=list)
    """Leases of the run, the stage and what else is held now."""

    def ensure_ray(self) -> ResolvedResources:
        """Have Ray, from the first stage on that needs it; what trials and workers take there."""
        return self.start_ray(self)

    @contextmanager
    def lease(self, name: str, what: str) -> Iterator[None]:
        """Hold a part of the work that other runs may share; see `minitron_platform.leases`."""
        # an earlier driver of this run may hold it still, but has lost the run
        earlier = "its run was taken over"
        with lease(self.locations, name, what, run=self.run_key, console=self.console, take_over=earlier) as fence:
            self.held.append(fence)
            try:
                yield
            finally:
                self.held.remove(fence)

    def check_fences(self) -> None:
        """Raise LeaseLostError if anything that is held was taken over by another driver."""
        for fence in self.held:
            fence.check()

    def log(self, part: str) -> RunLog:
        """The record of a stage, or of a search's trial, under this run."""
        prefix = f"{self.current.model}." if self.current and len(self.recipe.family) > 1 else ""
        return RunLog(self.locations.spool(self.run_key), f"{self.run_key}.{prefix}{part}")
