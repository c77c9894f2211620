"""The candidate architectures for each model of a recipe's family."""

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

MAX_ENUMERATED = 50_000  # combinations, which take about a second


@dataclass(frozen=True, eq=False)
class CandidateSpace:
    """The architectures that a recipe allows for one model of its family, `member`, if it is pruned from `base`.

    Each property is computed on first use and kept. A model that is pruned from the previous one of the family may list
    values in its space and points that are larger than that model's; they are left out.
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
        """Minimum and maximum number of parameters."""
        tolerance = self.member.tolerance
        return self.member.parameters * (1 - tolerance), self.member.parameters * (1 + tolerance)

    @cached_property
    def limits(self) -> Limits | None:
        """Upper limits for a candidate; None without limits."""
        return build.limits(self.recipe, self.member)

    @cached_property
    def axes(self) -> dict[str, list[int | float]]:
        """The values of each axis of the space."""
        space = self.member.space
        if self.member.start != "previous":
            return space
        fitting = {axis: [v for v in values if v <= getattr(self.base, axis, v)] for axis, values in space.items()}
        # an axis with no fitting value is left as it is, so that it is refused by its key
        return {axis: values or space[axis] for axis, values in fitting.items()}

    @cached_property
    def points(self) -> list[Architecture]:
        """The architectures that the recipe lists itself.

        Raises InputError for one that is outside the size or the limits.
        """
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
        """The space to sample candidates from; None if all of its architectures are candidates, because there is no sampler
        or the space has no more than the sampler would score.

        Raises InputError for a space that is too large to enumerate without a sampler.
        """
        sampler = self.recipe.search.sampler
        count = combinations(self.axes)
        if sampler is None and count > MAX_ENUMERATED:
            raise InputError(
                f"{self.key}.space: {count:,} combinations are too many to enumerate (the maximum is {MAX_ENUMERATED:,})",
                "add search.sampler, such as {candidates: 500}, with search.forward, or shorten the axes",
            )
        if sampler is None or (count <= MAX_ENUMERATED and len(self._enumerated) <= sampler.candidates):
            return None
        return Space(self.base, self.axes, *self.budget, self.limits, f"{self.key}.space")

    @cached_property
    def candidates(self) -> list[Architecture]:
        """The candidate architectures, the points first.

        If the space is to be sampled, they are drawn at random, as many as the sampler will score; the search chooses its
        own by their scores. Raises InputError if no architecture of the space has the size and keeps the limits.
        """
        self._check_size()
        if self.sampled:
            return self._drawn(self.sampled)
        if not self._enumerated:
            raise self._no_candidate_error()
        return self._enumerated

    @cached_property
    def _enumerated(self) -> list[Architecture]:
        return candidates(
            self.base, self.axes, *self.budget, limits=self.limits, points=self.points, key=f"{self.key}.space"
        )

    def _check_size(self) -> None:
        if self.member.parameters >= self.base.num_parameters:
            base = "the teacher" if self.member.start == "teacher" else "the previous model"
            raise InputError(
                f"{self.key}.parameters: {self.member.parameters:,} is not less than {base}'s {self.base.num_parameters:,}",
                "choose a smaller target, or a larger teacher",
            )

    def _drawn(self, space: Space) -> list[Architecture]:
        sampler = self.recipe.search.sampler
        assert sampler is not None
        count = max(0, sampler.candidates - len(self.points))
        drawn = [*self.points, *draw(space, count, sampler.seed, set(self.points))]
        if not drawn:
            low, high = self.budget
            raise InputError(
                f"{self.key}.space: none of 100,000 combinations, drawn at random from {combinations(self.axes):,}, has "
                f"{low:,.0f} to {high:,.0f} parameters{' within the limits' if self.limits else ''}",
                f"widen {self.key}.tolerance, raise {self.key}.limits, or change {self.key}.space",
            )
        return drawn

    def _no_candidate_error(self) -> InputError:
        """The error that says why the space has no candidate."""
        key = f"{self.key}.space"
        low, high = self.budget
        in_budget = candidates(self.base, self.axes, low, high, key=key)
        if in_budget and self.limits:
            reason = (
                self.limits.unreachable(in_budget)
                or "each limit is kept by some combination, but no one keeps them all"
            )
            return InputError(
                f"{self.key}.limits: none of {len(in_budget)} combinations with {low:,.0f} to {high:,.0f} parameters keeps "
                f"them: {reason}",
                f"raise {self.key}.limits, or widen {key}",
            )
        everything = candidates(self.base, self.axes, 0, float("inf"), key=key)
        nearest = min(everything, key=lambda a: abs(a.num_parameters - self.member.parameters), default=None)
        nearest_text = f"; the nearest has {nearest.num_parameters:,} ({nearest})" if nearest else ""
        base_text = f" inside {self.base}" if self.member.start == "previous" else ""
        return InputError(
            f"{key}: no combination{base_text} has {low:,.0f} to {high:,.0f} parameters{nearest_text}",
            f"widen {key} or {self.key}.tolerance",
        )


@dataclass(frozen=True, eq=False)
class MemberCandidates:
    """The candidates for one model of a family as far as they are known before the run: the model it is pruned from may be
    any candidate for the previous model."""

    space: CandidateSpace
    """Its space inside the largest model that it may be pruned from."""
    architectures: list[Architecture]
    """Its candidates inside any of the models that it may be pruned from, the largest first."""

    @property
    def sampled(self) -> bool:
        """Whether the search samples the space by scores; `architectures` are then as many, drawn at random."""
        return self.space.sampled is not None


def family_candidates(recipe: Recipe, teacher: Architecture) -> dict[str, MemberCandidates]:
    """The candidates for each model of the family, by its name. Raises InputError as `CandidateSpace` does."""
    family: dict[str, MemberCandidates] = {}
    for member in recipe.family:
        previous = recipe.origin(member)
        bases = family[previous.model].architectures if previous else [teacher]
        spaces = [CandidateSpace(recipe, member, bases[0])]
        if not spaces[0].sampled:  # each other base would give another sample
            spaces += [CandidateSpace(recipe, member, base) for base in bases[1:]]
        distinct = dict.fromkeys(architecture for space in spaces for architecture in space.candidates)
        family[member.model] = MemberCandidates(spaces[0], sorted(distinct, key=lambda a: -a.num_parameters))
    return family
