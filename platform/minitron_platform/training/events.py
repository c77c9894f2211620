"""Events that the workers of a training send to the driver, besides those of `minitron_platform.workers`."""

from __future__ import annotations

from dataclasses import dataclass

from minitron_platform.workers.worker import WorkersFailed, WorkerStarted


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
class Alarm:
    """Something that the user should look at; the training goes on."""

    name: str
    """What it is about, for the tag minitron.alarm.NAME of the run; a later alarm replaces the tag."""
    text: str


Event = WorkerStarted | Resumed | Measured | Tagged | Alarm | WorkersFailed
