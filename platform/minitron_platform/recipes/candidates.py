"""Which architectures a recipe allows for each model of its family."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from minitron.architecture import Architecture
from minitron.errors import InputError
from minitron_platform.recipes import build
from minitron_platform.recipes.schema import Member, Recipe
from minitron_search.limits import Limits
from minitron_search.sampling import Space, draw
from minitron_search.space import candidates, combinations, points_in

ENUMERABLE = 50_000  # combinations, which take about a second


@dataclass(frozen=True, eq=False)
class CandidateSpace:
    """What a recipe allows for `member`, one model of its family, where that is cut from `base`.

    Everything is worked out when it is first read, once. A model that follows another may name larger values in its space or
    its points than the one it is cut from has; they are left out.
    """

    recipe: Recipe
    member: Member
    base: Architecture

    @property
    def key(self) -> str:
        """The model's key in the recipe."""
        return self.recipe.key(self.member)

    @property
    def budget(self) -> tuple[float, float]:
        """Fewest and most parameters."""
        tolerance = self.member.tolerance
        return self.member.parameters * (1 - tolerance), self.member.parameters * (1 + tolerance)

    @cached_property
    def limits(self) -> Limits | None:
        """What a candidate may need at most; None for no limit."""
        return build.limits(self.recipe, self.member)

    @cached_property
    def axes(self) -> dict[str, list[int | float]]:
        """The values of every axis."""
        space = self.member.space
        if self.member.start != "previous":
            return space
        fitting = {axis: [v for v in values if v <= getattr(self.base, axis, v)] for axis, values in space.items()}
        # an axis without a value that fits is kept, to be refused by its key
        return {axis: values or space[axis] for axis, values in fitting.items()}

    @cached_property
    def points(self) -> list[Architecture]:
        """The shapes that the recipe names. Raises InputError for one that is no candidate."""
        return points_in(
            self.base,
            self.member.points,
            *self.budget,
            limits=self.limits,
            key=f"{self.key}.points",
            skip=self.member.start == "previous",
        )

    @cached_property
    def sampled(self) -> Space | None:
        """The space to sample from; None if every architecture in it is a candidate, as all are where the sampler would score
        no fewer. Raises InputError for a space that is too large to enumerate without a sampler."""
        sampler = self.recipe.search.sampler
        count = combinations(self.axes)
        if sampler is None and count > ENUMERABLE:
            raise InputError(
                f"{self.key}.space: {count:,} combinations are too many to look at each (up to {ENUMERABLE:,})",
                "add search.sampler, such as {candidates: 500}, with search.forward, or shorten the axes",
            )
        if sampler is None or (count <= ENUMERABLE and len(self._enumerated) <= sampler.candidates):
            return None
        return Space(self.base, self.axes, *self.budget, self.limits, f"{self.key}.space")

    @cached_property
    def candidates(self) -> list[Architecture]:
        """The architectures to compare, the points first.

        Where the space is to be sampled they are drawn at random, as many as the sampler will score; the search itself goes
        by the scores. Raises InputError for a size that cannot be met from the space.
        """
        self._check_size()
        if self.sampled:
            return self._drawn(self.sampled)
        if not self._enumerated:
            raise self._none_fits()
        return self._enumerated

    @cached_property
    def _enumerated(self) -> list[Architecture]:
        return candidates(
            self.base, self.axes, *self.budget, limits=self.limits, points=self.points, key=f"{self.key}.space"
        )

    def _check_size(self) -> None:
        if self.member.parameters >= self.base.num_parameters:
            whose = "the teacher's" if self.member.start == "teacher" else "those of the model it is cut from,"
            raise InputError(
                f"{self.key}.parameters: {self.member.parameters:,} is not smaller than {whose} "
                f"{self.base.num_parameters:,}",
                "choose a smaller target, or a larger teacher",
            )

    def _drawn(self, space: Space) -> list[Architecture]:
        sampler = self.recipe.search.sampler
        assert sampler is not None
        number = max(0, sampler.candidates - len(self.points))
        drawn = [*self.points, *draw(space, number, sampler.seed, set(self.points))]
        if not drawn:
            low, high = self.budget
            raise InputError(
                f"{self.key}.space: 100,000 of {combinations(self.axes):,} combinations drawn at random, and none has "
                f"{low:,.0f} to {high:,.0f} parameters{' within its limits' if self.limits else ''}",
                f"widen {self.key}.tolerance, raise {self.key}.limits, or change {self.key}.space",
            )
        return drawn

    def _none_fits(self) -> InputError:
        """Why there is no candidate."""
        key, (low, high) = f"{self.key}.space", self.budget
        sized = candidates(self.base, self.axes, low, high, key=key)
        if sized and self.limits:
            over = self.limits.unreachable(sized) or "no combination keeps to all of them at once"
            return InputError(
                f"{self.key}.limits: none of {len(sized)} combinations with {low:,.0f} to {high:,.0f} parameters keeps to "
                f"them: {over}",
                f"raise {self.key}.limits, or widen {key}",
            )
        everything = candidates(self.base, self.axes, 0, float("inf"), key=key)
        nearest = min(everything, key=lambda a: abs(a.num_parameters - self.member.parameters), default=None)
        near = f"; the nearest has {nearest.num_parameters:,} ({nearest})" if nearest else ""
        inside = f" inside {self.base}" if self.member.start == "previous" else ""
        return InputError(
            f"{key}: no combination{inside} has {low:,.0f} to {high:,.0f} parameters{near}",
            f"widen {key} or {self.key}.tolerance",
        )


@dataclass(frozen=True, eq=False)
class MemberCandidates:
    """The candidates for one model of a family before the models that it follows are known."""

    space: CandidateSpace
    """The space inside the largest model that it may be cut from."""
    architectures: list[Architecture]
    """Those that any outcome before it allows, the largest first."""

    @property
    def sampled(self) -> bool:
        """Whether the search samples them by their scores; `architectures` are then as many, drawn at random."""
        return self.space.sampled is not None


def family_candidates(recipe: Recipe, teacher: Architecture) -> dict[str, MemberCandidates]:
    """The candidates for each model of the family, by its name. Raises InputError as `CandidateSpace` does."""
    family: dict[str, MemberCandidates] = {}
    for member in recipe.family:
        before = recipe.origin(member)
        bases = family[before.model].architectures if before else [teacher]
        spaces = [CandidateSpace(recipe, member, bases[0])]
        if not spaces[0].sampled:  # inside the other bases it would be another sample
            spaces += [CandidateSpace(recipe, member, base) for base in bases[1:]]
        found = dict.fromkeys(architecture for space in spaces for architecture in space.candidates)
        family[member.model] = MemberCandidates(spaces[0], sorted(found, key=lambda a: -a.num_parameters))
    return family
