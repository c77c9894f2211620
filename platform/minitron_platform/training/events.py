"""What the workers of a training tell the driver, and what Ray Train tells of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerStarted:
    """A worker runs on a node, named by host and address."""

    rank: int
    node: str


@dataclass(frozen=True)
class Resumed:
    """All workers have the state after this many steps, 0 for a new training, and go on from there."""

    step: int


@dataclass(frozen=True)
class Measured:
    """Metrics after a step."""

    values: dict[str, float]
    step: int


@dataclass(frozen=True)
class Tagged:
    """Labels of the run, of which the last value counts."""

    values: dict[str, str]


@dataclass(frozen=True)
class WorkersFailed:
    """Workers died or raised, for one reason; those that only lost their connection to them are not among `ranks`."""

    ranks: tuple[int, ...]
    reason: str


Event = WorkerStarted | Resumed | Measured | Tagged | WorkersFailed
OnEvent = Callable[[Event], None]
