"""The state of a run together with the services that a stage needs while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from minitron_platform.console import Console
from minitron_platform.fence import Fence, Fences
from minitron_platform.leases import lease
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.stages.state import RunState
from minitron_platform.tracking.spool import RunLog, Spool
from minitron_platform.workers.workers import Workers


@dataclass(kw_only=True)
class Context(RunState):
    """A run of a recipe in progress."""

    console: Console
    start_ray: Callable[[Context], ResolvedResources]
    """Starts Ray or joins a cluster on the first call; see `ensure_ray`."""
    workers: Workers
    spool: Spool
    """The records of the run and its parts."""
    mlflow_run_id: Callable[[str], str | None]
    """Waits for the ID of the MLflow run of a record, by the record's key; None if MLflow has not answered in time."""
    held: list[Fence] = field(default_factory=list)
    """Fences of the leases that are held now: of the run, of the stage, and others."""

    def ensure_ray(self) -> ResolvedResources:
        """Start Ray or join the cluster if that has not happened yet; returns the resources of trials and workers there."""
        return self.start_ray(self)

    @contextmanager
    def lease(self, name: str, what: str) -> Iterator[None]:
        """Hold a lease, so that no other driver does the same work at the same time; see `minitron_platform.leases`.

        name: of the lease. what: the work, for messages.
        """
        # an earlier driver of this run may still hold it, but has lost the run itself
        earlier = "its run was taken over"
        with lease(self.locations, name, what, run=self.run_key, console=self.console, take_over=earlier) as fence:
            self.held.append(fence)
            try:
                yield
            finally:
                self.held.remove(fence)

    def check_fences(self) -> None:
        """Raise LeaseLostError if another driver has taken over any of the leases that are held."""
        self.fences.check()

    @property
    def fences(self) -> Fences:
        """The leases that are held now. Their `check` can be sent to processes that write for this driver."""
        return Fences(tuple(self.held))

    def log(self, part: str) -> RunLog:
        """The record of a stage or trial of this run; `part` is its name."""
        return self.spool.record(self.record_key(part, self.current))
