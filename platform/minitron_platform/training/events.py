"""Events that the workers of a training and Ray Train's controller send to the driver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerStarted:
    """A worker has started."""

    rank: int
    node: str
    """Host name and address of its node."""


@dataclass(frozen=True)
class Resumed:
    """The training starts or continues."""

    step: int
    """Number of steps done before; 0 for a new training."""


@dataclass(frozen=True)
class Measured:
    """Metrics after step `step`."""

    values: dict[str, float]
    step: int


@dataclass(frozen=True)
class Tagged:
    """Tags for the run; a later value of a tag replaces an earlier one."""

    values: dict[str, str]


@dataclass(frozen=True)
class WorkersFailed:
    """Workers died or raised an error."""

    ranks: tuple[int, ...]
    """Workers that failed first, without those that failed only because they lost the connection to these."""
    reason: str


Event = WorkerStarted | Resumed | Measured | Tagged | WorkersFailed
OnEvent = Callable[[Event], None]
