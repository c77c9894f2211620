"""Candidates from a space that is too large to enumerate: Optuna's sampler proposes them and learns from their scores.

The sampler is the tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011; multivariate, arXiv 2304.11127). It
proposes in rounds whose size depends on the number of candidates alone, so that the same scores lead to the same candidates on
any cluster. A search that was killed proposes the same candidates again, and their scores are read from storage.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Container, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral

from minitron.architecture import Architecture
from minitron.arguments import check_type, check_types
from minitron_search.limits import Limits
from minitron_search.space import MLP_RATIO, candidate, check_budget, check_space, combinations

Score = Callable[[list[Architecture]], Mapping[Architecture, float]]
GridIndex = dict[str, int]  # the index of a value, for every axis

ROUNDS = 10
SMALLEST_ROUND = 10
ASKS_PER_CANDIDATE = 10  # calls of the sampler; candidates that are still missing then are drawn at random
RANDOM_ONE_IN = 5  # of the candidates of a round, so that no region is given up for good
MAX_PROPOSALS_FACTOR = 10  # proposals per candidate in all, before sampling ends
DRAWS = 100_000  # random combinations tried per round


@dataclass(frozen=True)
class Space:
    """The architectures that `minitron_search.candidates` would enumerate, for `sample` to draw from.

    They are all combinations of `axes` that can be pruned from `base`, have `low` to `high` parameters and keep to `limits`.
    Raises InputError as `candidates` does, naming values under `key`.
    """

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
        """The architecture at a point of the grid; None if it is not a valid model, or outside the budget or the limits."""
        values = {axis: self.axes[axis][index] for axis, index in grid_index.items()}
        return candidate(self.base, values, self.low, self.high, self.limits)

    def near(self, grid_index: Mapping[str, int], known: Container[Architecture]) -> Architecture | None:
        """The architecture that is nearest to a point of the grid along the axis with the most values, and not in `known`; None
        if there is none. In a narrow budget few points are valid, and most others have a valid one near them on that axis."""
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
    """`count` different random architectures of `space` that are not in `known`, the same for the same `seed`. They are fewer
    if 100,000 random combinations do not contain that many."""
    generator = random.Random(f"draw {seed}")
    drawn: dict[Architecture, None] = {}
    tried: set[tuple[int, ...]] = set()
    all_tried = combinations(space.axes)
    for _ in range(DRAWS):
        if len(drawn) >= count or len(tried) == all_tried:
            break
        indices = tuple(generator.randrange(len(values)) for values in space.axes.values())
        if indices in tried:
            continue
        tried.add(indices)
        architecture = space.at(dict(zip(space.axes, indices, strict=True)))
        if architecture is not None and architecture not in known:
            drawn[architecture] = None
    return list(drawn)


def sample(
    score: Score, space: Space, count: int, *, seed: int = 0, points: Sequence[Architecture] = ()
) -> list[Architecture]:
    """`count` architectures of `space`, in the order in which they were scored: `points`, then what the sampler proposes.

    `score` is called with a list of architectures and returns the score of each: lower is better, NaN stands for a failure. An
    architecture that it leaves out of its result is not counted. The first round is drawn at random. The result is shorter
    than `count` if the space contains fewer architectures, if neither the sampler nor 100,000 random draws yield more, or if
    `score` leaves out nine in ten. Raises InputError for an argument of the wrong type.
    """
    check_type("space", space, Space)
    check_type("count", count, Integral)
    check_types("points", points, Architecture)
    known: set[Architecture] = set()
    values: dict[Architecture, float] = {}
    number = 0
    while len(values) < count and len(known) < MAX_PROPOSALS_FACTOR * count:
        first = [] if number else list(points)
        known |= set(first)
        size = max(0, min(round_size(count), count - len(values) - len(first)))
        finite = {a: value for a, value in values.items() if math.isfinite(value)}
        from_sampler = size - size // RANDOM_ONE_IN if number else 0
        proposed = _propose(space, finite, from_sampler, f"{seed} {number}", known) if from_sampler else []
        proposed += draw(space, size - len(proposed), seed + number, known | set(proposed))
        known |= set(proposed)
        if not first + proposed:
            break
        values |= score(first + proposed)
        number += 1
    return list(values)


def round_size(count: int) -> int:
    """Number of architectures per round, of `count` in all: all of them are proposed before any is scored."""
    return max(SMALLEST_ROUND, math.ceil(count / ROUNDS))


def _propose(
    space: Space, values: Mapping[Architecture, float], count: int, seed: str, known: Set[Architecture]
) -> list[Architecture]:
    """Up to `count` architectures that are not in `known`, from a sampler that has learned the scores `values`."""
    import optuna
    from optuna.distributions import BaseDistribution, IntDistribution
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    grid: dict[str, BaseDistribution] = {a: IntDistribution(0, len(v) - 1) for a, v in space.axes.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls the multivariate estimator experimental
        sampler = optuna.samplers.TPESampler(
            seed=random.Random(seed).getrandbits(32), n_startup_trials=1, multivariate=True, constant_liar=True
        )
    study = optuna.create_study(sampler=sampler)
    for architecture, value in values.items():
        if (grid_index := space.grid_index(architecture)) is not None:
            study.add_trial(create_trial(params=grid_index, distributions=grid, value=value))
    proposed: dict[Architecture, None] = {}
    for _ in range(ASKS_PER_CANDIDATE * count):
        if len(proposed) == count:
            break
        trial = study.ask(grid)
        nearest = space.near(trial.params, known | proposed.keys())
        if nearest is None:
            study.tell(trial, state=TrialState.FAIL)
        else:
            proposed[nearest] = None
    return list(proposed)
