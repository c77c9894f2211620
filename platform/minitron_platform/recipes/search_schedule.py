"""How long the candidates of a search are trained, derived from the recipe's `search` section alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from minitron_platform.recipes import build
from minitron_platform.recipes.schema import Search
from minitron_search.halving import Halving, kept, planned_steps, rung_steps


@dataclass(frozen=True, eq=False)
class SearchSchedule:
    """Steps and rungs of the short distillations of a search."""

    search: Search

    @property
    def steps(self) -> int:
        """Training steps of a candidate that is not stopped at a rung."""
        return self.search.training.steps

    @cached_property
    def rungs(self) -> tuple[int, ...]:
        """The steps after which candidates are measured, without the last."""
        return rung_steps(self.search.rungs, self.steps)

    @cached_property
    def halving(self) -> Halving | None:
        """The rule that stops candidates at rungs; None if all are distilled to the end."""
        return build.halving(self.search)

    @cached_property
    def stop_rungs(self) -> list[int]:
        """The rungs at which candidates are stopped whatever is measured; empty if that depends on the measurements."""
        if self.halving is None or self.halving.grace == "stable":
            return []
        return self.halving.stop_rungs(self.rungs, self.steps)

    def distilled(self, candidates: int, points: int) -> int:
        """Maximum number of candidates that are distilled, of `candidates` in all and `points` that the recipe lists."""
        forward = self.search.forward
        return min(candidates, forward.keep + points) if forward else candidates

    def total_steps(self, distilled: int) -> int:
        """Training steps of all candidates together, if `distilled` candidates are distilled."""
        return planned_steps(distilled, self.steps, self.stop_rungs, self._keep)

    def to_end(self, distilled: int) -> int:
        """Number of candidates that survive every rung, of `distilled`."""
        survivors = distilled
        for _ in self.stop_rungs:
            survivors = kept(survivors, self._keep)
        return survivors

    @property
    def _keep(self) -> float:
        return self.halving.keep if self.halving else 1
