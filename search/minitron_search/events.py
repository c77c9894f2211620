"""What a candidate's work reports while it is done: by the trial itself, or by the pool that carries it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args


@dataclass(frozen=True)
class Started:
    """Process `pid` has taken the candidate up."""

    pid: int


@dataclass(frozen=True)
class Scored:
    """Process `pid` has measured the candidate, pruned and untrained: held-out KL and loss, in nats per token. Nothing else
    was to be done."""

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
    """Training has done `step` steps; `metrics` are those of `minitron.distill.StepReport`."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RungReached:
    """Held-out KL and loss, in nats per token, at a rung."""

    step: int
    kl: float
    loss: float


@dataclass(frozen=True)
class Paused:
    """The trial waits at this step until it is decided which candidates go on."""

    step: int


@dataclass(frozen=True)
class Finished:
    """Held-out KL and loss, in nats per token, after the last step."""

    step: int
    kl: float
    loss: float


@dataclass(frozen=True)
class Retried:
    """An attempt ended for `reason` and the next one begins; `trace` is what was raised, `node` where it ran, empty where that
    is not known."""

    reason: str
    trace: str
    node: str
    restarts_left: int


@dataclass(frozen=True)
class Failed:
    """The candidate is given up for `reason`; `trace` is what was raised, empty where the reason says all."""

    reason: str
    trace: str = ""


Event = Started | Scored | Undistilled | Progress | RungReached | Paused | Finished | Retried | Failed
Report = Callable[[Event], None]

_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}


def to_tune(event: Event) -> dict[str, Any]:
    """An event as the dict of plain values that Ray Tune takes from a trial."""
    return {"event": {"kind": type(event).__name__, **asdict(event)}}


def from_tune(result: Mapping[str, Any]) -> Event | None:
    """The event in a result that Ray Tune hands on; None in one that Tune made itself."""
    if "event" not in result:
        return None
    values = dict(result["event"])
    return _KINDS[values.pop("kind")](**values)
