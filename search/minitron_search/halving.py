"""Successive halving (arXiv 1502.07943) with a grace period: which candidates stop at which step of the short run.

All candidates train on one schedule, so what they have done at a rung is the same prefix for each and compares. The grace
period of three quarters follows arXiv 2407.14679 figure 9, where the order of the candidates settles at about 300 of 400
steps; "stable" measures instead whether it has settled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from minitron_search.tau import SETTLED, kendall_tau


@dataclass(frozen=True)
class Halving:
    """At every rung from the share `grace` of the run on, the best share `keep` of the candidates goes on. With "stable",
    at every rung where the candidates are in the order that they were in at the measurement before it (Kendall's tau of at
    least 0.9), be it the rung before or the one before any training."""

    keep: float = 0.5
    grace: float | Literal["stable"] = 0.75

    def cuts(self, rungs: Sequence[int], steps: int) -> list[int]:
        """The rungs, in steps, at which candidates may be stopped."""
        return [rung for rung in rungs if self.grace == "stable" or rung >= self.grace * steps]

    def due(self, before: Mapping[str, float], now: Mapping[str, float]) -> bool:
        """Whether to stop candidates at a rung where their KL is `now` and was `before` at the measurement before."""
        if self.grace != "stable":
            return True
        names = [name for name in now if name in before]
        return kendall_tau([before[name] for name in names], [now[name] for name in names]) >= SETTLED


def rung_steps(shares: Sequence[float], steps: int) -> tuple[int, ...]:
    """Shares of a run as steps, rounded up; those before the first or at the last step are none."""
    rungs = {math.ceil(share * steps - 1e-9) for share in shares}
    return tuple(sorted(rung for rung in rungs if 0 < rung < steps))


def survivors(kl: Mapping[str, float], keep: float) -> list[str]:
    """Names of the best share `keep` by KL, rounded up, best first."""
    return sorted(kl, key=lambda name: kl[name])[: kept(len(kl), keep)]


def kept(count: int, keep: float) -> int:
    """How many of `count` go on."""
    return min(count, math.ceil(keep * count - 1e-9))


def planned_steps(count: int, steps: int, cuts: Sequence[int], keep: float) -> int:
    """Training steps of a search over `count` candidates that are cut at the steps `cuts`, all candidates together."""
    total, before = 0, 0
    for cut in cuts:
        total, count, before = total + count * (cut - before), kept(count, keep), cut
    return total + count * (steps - before)
