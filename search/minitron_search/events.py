"""The events of a candidate, reported by its trial or by the pool that runs the trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args


@dataclass(frozen=True)
class Started:
    """Process `pid` has started or resumed the candidate's trial."""

    pid: int


@dataclass(frozen=True)
class Scored:
    """Process `pid` has scored the candidate, pruned and untrained: held-out KL and loss, in nats per token. No training
    follows."""

    pid: int
    kl: float
    loss: float


@dataclass(frozen=True)
class Undistilled:
    """Held-out KL and loss, in nats per token, right before the candidate's distillation."""

    kl: float
    loss: float


@dataclass(frozen=True)
class Progress:
    """Training has completed `step` steps; `metrics` are those of `minitron.distill.StepReport`."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RungReached:
    """Held-out KL and loss, in nats per token, at a rung."""

    step: int
    kl: float
    loss: float


@dataclass(frozen=True)
class Leaving:
    """A node of the trial is about to be taken away. Its state after `step` steps is stored, so that it can go on elsewhere."""

    step: int


@dataclass(frozen=True)
class Paused:
    """The trial waits after this step until it is decided which candidates continue."""

    step: int


@dataclass(frozen=True)
class Finished:
    """Held-out KL and loss, in nats per token, after the last step."""

    step: int
    kl: float
    loss: float


@dataclass(frozen=True)
class Retried:
    """An attempt failed for `reason` and the next one begins. `trace` is the traceback, `node` the node on which the attempt
    ran, empty if that is not known."""

    reason: str
    trace: str
    node: str
    restarts_left: int


@dataclass(frozen=True)
class Failed:
    """The candidate has failed for good, for `reason`; `trace` is the traceback, empty if the reason says all."""

    reason: str
    trace: str = ""


@dataclass(frozen=True)
class OutOfGpuMemory:
    """The GPU had too little memory for the candidate, for `reason`. The pool turns this into `Failed`, or on a shared GPU into
    `Retried`, because another trial may have taken the memory."""

    reason: str


Event = (
    Started
    | Scored
    | Undistilled
    | Progress
    | RungReached
    | Leaving
    | Paused
    | Finished
    | Retried
    | Failed
    | OutOfGpuMemory
)
Report = Callable[[Event], None]

_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}


def to_tune(event: Event) -> dict[str, Any]:
    """The event as a dict of plain values, which Ray Tune accepts as a trial's result."""
    return {"event": {"kind": type(event).__name__, **asdict(event)}}


def from_tune(result: Mapping[str, Any]) -> Event | None:
    """The event in a result from Ray Tune; None for a result that Tune created itself."""
    if "event" not in result:
        return None
    values = dict(result["event"])
    return _KINDS[values.pop("kind")](**values)
