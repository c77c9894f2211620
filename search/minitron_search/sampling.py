"""Candidates of a space too large to enumerate: Optuna proposes, the analytic filter rejects, scores are told back.

The sampler is the tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011; multivariate, arXiv 2304.11127). It
proposes in rounds, whose size follows from the number of candidates alone, so that the same scores lead to the same
candidates on any cluster; a search that was killed proposes the same again and reads their scores back.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Container, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral

from minitron.architecture import Architecture
from minitron_search.arguments import check_type, check_types
from minitron_search.limits import Limits
from minitron_search.space import MLP_RATIO, candidate, check_budget, check_space

Score = Callable[[list[Architecture]], Mapping[Architecture, float]]
GridIndex = dict[str, int]  # for every axis the index of its value

ROUNDS = 10
SMALLEST_ROUND = 10
ASKS = 10  # of the sampler, per candidate of a round; what is missing then is drawn at random
AT_RANDOM = 5  # one in this many of a round, so that a region that the sampler has given up is not lost
MOST_PROPOSED = 10  # times as many as are wanted
DRAWS = 100_000  # per round


@dataclass(frozen=True)
class Space:
    """What `minitron_search.candidates` enumerates, to be drawn from instead: the architectures of `axes` inside `base` with
    `low` to `high` parameters and within `limits`. Raises InputError as that does, naming values under `key`."""

    base: Architecture
    axes: Mapping[str, Sequence[float]]
    low: float
    high: float
    limits: Limits | None = None
    key: str = "space"

    def __post_init__(self) -> None:
        check_budget(self.base, self.low, self.high, self.limits)
        check_space(self.base, self.axes, self.key)
        object.__setattr__(self, "axes", {axis: sorted(set(values)) for axis, values in self.axes.items()})

    def at(self, grid_index: Mapping[str, int]) -> Architecture | None:
        """The architecture at a point of the grid; None where that is no model, or one out of the budget or the limits."""
        values = {axis: self.axes[axis][index] for axis, index in grid_index.items()}
        return candidate(self.base, values, self.low, self.high, self.limits)

    def near(self, grid_index: Mapping[str, int], known: Container[Architecture]) -> Architecture | None:
        """The architecture that is nearest to a point of the grid along the axis with the most values and not `known`; None
        if there is none. Few points are in a narrow budget, and most of the others have one beside them that is."""
        finest = max(self.axes, key=lambda axis: len(self.axes[axis]))
        for index in sorted(range(len(self.axes[finest])), key=lambda index: abs(index - grid_index[finest])):
            architecture = self.at({**grid_index, finest: index})
            if architecture is not None and architecture not in known:
                return architecture
        return None

    def grid_index(self, architecture: Architecture) -> GridIndex | None:
        """The grid point of an architecture; None if it is not on the grid."""
        result: GridIndex = {}
        for axis, values in self.axes.items():
            if axis == MLP_RATIO:
                matches = [int(ratio * architecture.hidden_size) == architecture.intermediate_size for ratio in values]
            else:
                matches = [value == getattr(architecture, axis) for value in values]
            if True not in matches:
                return None
            result[axis] = matches.index(True)
        return result if self.at(result) == architecture else None


def draw(space: Space, count: int, seed: int, known: Set[Architecture] = frozenset()) -> list[Architecture]:
    """Up to `count` different architectures of `space` at random, none of them `known`, the same ones for the same `seed`.
    They are fewer where 100,000 draws found no more."""
    dice, found = random.Random(f"draw {seed}"), dict[Architecture, None]()
    for _ in range(DRAWS):
        if len(found) >= count:
            break
        architecture = space.at({axis: dice.randrange(len(values)) for axis, values in space.axes.items()})
        if architecture is not None and architecture not in known:
            found[architecture] = None
    return list(found)


def sample(
    score: Score, space: Space, count: int, *, seed: int = 0, points: Sequence[Architecture] = ()
) -> list[Architecture]:
    """`count` architectures of `space`, in the order in which they were scored: `points`, then what the sampler proposes.

    `score` gets some at a time and returns the value of each, lower is better and NaN says that it has none; one that it
    leaves out is not counted. The first round is drawn at random. They are fewer than `count` where the space has no more, so
    few in the budget that neither the sampler nor 100,000 draws found more, or `score` left out nine in ten. Raises InputError
    for an argument of the wrong type.
    """
    check_type("space", space, Space)
    check_type("count", count, Integral)
    check_types("points", points, Architecture)
    known: set[Architecture] = set()
    values: dict[Architecture, float] = {}
    number = 0
    while len(values) < count and len(known) < MOST_PROPOSED * count:
        first = [] if number else list(points)
        known |= set(first)
        wanted = max(0, min(round_size(count), count - len(values) - len(first)))
        finite = {a: value for a, value in values.items() if math.isfinite(value)}
        informed = wanted - wanted // AT_RANDOM if number else 0
        proposed = _propose(space, finite, informed, f"{seed} {number}", known) if informed else []
        proposed += draw(space, wanted - len(proposed), seed + number, known | set(proposed))
        known |= set(proposed)
        if not first + proposed:
            break
        values |= score(first + proposed)
        number += 1
    return list(values)


def round_size(count: int) -> int:
    """How many are proposed before any of them is scored, of `count` in all."""
    return max(SMALLEST_ROUND, math.ceil(count / ROUNDS))


def _propose(
    space: Space, values: Mapping[Architecture, float], wanted: int, seed: str, known: Set[Architecture]
) -> list[Architecture]:
    """Up to `wanted` architectures that are not `known`, by a sampler that has seen `values`."""
    import optuna
    from optuna.distributions import BaseDistribution, IntDistribution
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    grid: dict[str, BaseDistribution] = {a: IntDistribution(0, len(v) - 1) for a, v in space.axes.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the multivariate estimator is experimental
        sampler = optuna.samplers.TPESampler(
            seed=random.Random(seed).getrandbits(32), n_startup_trials=1, multivariate=True, constant_liar=True
        )
    study = optuna.create_study(sampler=sampler)
    for known_one, value in values.items():
        if (grid_index := space.grid_index(known_one)) is not None:
            study.add_trial(create_trial(params=grid_index, distributions=grid, value=value))
    found: dict[Architecture, None] = {}
    for _ in range(ASKS * wanted):
        if len(found) == wanted:
            break
        trial = study.ask(grid)
        architecture = space.near(trial.params, known | found.keys())
        if architecture is None:
            study.tell(trial, state=TrialState.FAIL)
        else:
            found[architecture] = None
    return list(found)
