"""Successive halving (arXiv 1502.07943) with a grace period: which candidates are stopped at which step.

All candidates have the same learning rate schedule, so that at a rung they have done the same part of it and can be compared.
The grace period of three quarters follows arXiv 2407.14679 figure 9, where the order of the candidates settles at about 300 of
400 steps; "stable" measures instead whether the order has settled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from minitron.architecture import Architecture
from minitron.arguments import check_type
from minitron.errors import InputError
from minitron_search.tau import SETTLED, kendall_tau


@dataclass(frozen=True)
class Halving:
    """At every rung after the share `grace` of the steps, the best share `keep` of the candidates continues.

    With `grace="stable"` that is done at every rung where the order of the candidates is that of the measurement before
    (Kendall's tau of at least 0.9): the previous rung, or for the first rung the KL before any training. Raises InputError for
    a share outside 0 to 1.
    """

    keep: float = 0.5
    grace: float | Literal["stable"] = 0.75

    def __post_init__(self) -> None:
        check_type("keep", self.keep, Real)
        if not 0 < self.keep <= 1:
            raise InputError(f"keep: {self.keep}", "give a share above 0, up to 1")
        if self.grace != "stable":
            check_type("grace", self.grace, Real)
            if not 0 <= self.grace <= 1:
                raise InputError(f"grace: {self.grace}", 'give a share from 0 to 1, or "stable"')

    def stop_rungs(self, rungs: Sequence[int], steps: int) -> list[int]:
        """The rungs, in steps, at which candidates may be stopped."""
        return [rung for rung in rungs if self.grace == "stable" or rung >= self.grace * steps]

    def should_stop(self, before: Mapping[Architecture, float], now: Mapping[Architecture, float]) -> bool:
        """Whether to stop candidates at a rung where their KL is `now`, and was `before` at the previous measurement."""
        if self.grace != "stable":
            return True
        both = [architecture for architecture in now if architecture in before]
        return kendall_tau([before[a] for a in both], [now[a] for a in both]) >= SETTLED


def rung_steps(shares: Sequence[float], steps: int) -> tuple[int, ...]:
    """Shares of the training as steps, rounded up; rungs at step 0 or at the last step are dropped."""
    rungs = {math.ceil(share * steps - 1e-9) for share in shares}
    return tuple(sorted(rung for rung in rungs if 0 < rung < steps))


def survivors(kl: Mapping[Architecture, float], keep: float) -> list[Architecture]:
    """The best share `keep` by KL, rounded up, best first."""
    return sorted(kl, key=lambda architecture: kl[architecture])[: kept(len(kl), keep)]


def kept(count: int, keep: float) -> int:
    """Number of `count` candidates that continue."""
    return min(count, math.ceil(keep * count - 1e-9))


def planned_steps(count: int, steps: int, stop_rungs: Sequence[int], keep: float) -> int:
    """Training steps of all `count` candidates of a search together, if the share `keep` continues at each of `stop_rungs`."""
    total = 0
    last = 0
    for rung in stop_rungs:
        total += count * (rung - last)
        count = kept(count, keep)
        last = rung
    return total + count * (steps - last)
