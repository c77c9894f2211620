"""Successive halving (arXiv 1502.07943) with a grace period: which candidates stop at which step of the short run.

All candidates train on one schedule, so what they have done at a rung is the same prefix for each and compares. The grace
period of three quarters follows arXiv 2407.14679 figure 9, where the order of the candidates settles at about 300 of 400
steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Halving:
    """At every rung from the share `grace` of the run on, the best share `keep` of the candidates goes on."""

    keep: float = 0.5
    grace: float = 0.75

    def cuts(self, rungs: Sequence[int], steps: int) -> list[int]:
        """The rungs, in steps, at which candidates are stopped."""
        return [rung for rung in rungs if rung >= self.grace * steps]


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
