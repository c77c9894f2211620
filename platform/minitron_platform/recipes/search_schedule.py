"""How far the candidates of a recipe's search are trained, from its `search` section alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from minitron_platform.recipes import build
from minitron_platform.recipes.schema import Search
from minitron_search.halving import Halving, kept, planned_steps, rung_steps


@dataclass(frozen=True, eq=False)
class SearchSchedule:
    search: Search

    @property
    def steps(self) -> int:
        """Training steps of a candidate that no rung stops."""
        return self.search.training.steps

    @cached_property
    def rungs(self) -> tuple[int, ...]:
        """The steps before the last after which candidates are measured."""
        return rung_steps(self.search.rungs, self.steps)

    @cached_property
    def halving(self) -> Halving | None:
        """The rule that stops candidates at rungs; None if all are trained to the end."""
        return build.halving(self.search)

    @cached_property
    def stop_rungs(self) -> list[int]:
        """The rungs at which candidates are certain to be stopped."""
        if self.halving is None or self.halving.grace == "stable":
            return []
        return self.halving.stop_rungs(self.rungs, self.steps)

    def distilled(self, candidates: int, points: int) -> int:
        """Number of candidates that are trained at all, at most, of which `points` are named by the recipe."""
        forward = self.search.forward
        return min(candidates, forward.keep + points) if forward else candidates

    def total_steps(self, distilled: int) -> int:
        """Training steps of all candidates together."""
        return planned_steps(distilled, self.steps, self.stop_rungs, self._keep)

    def to_end(self, distilled: int) -> int:
        """Number of candidates that are trained to the end."""
        for _ in self.stop_rungs:
            distilled = kept(distilled, self._keep)
        return distilled

    @property
    def _keep(self) -> float:
        return self.halving.keep if self.halving else 1
