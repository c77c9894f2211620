"""What a search returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minitron.architecture import Architecture, PrunableAxis, axes_present
from minitron_search.ranking import RankedCandidate
from minitron_search.stability import MeasureStability

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class StoppedCandidate:
    """A candidate that a rung stopped, with its held-out KL before training and there, in nats per token."""

    architecture: Architecture
    kl_undistilled: float
    step: int
    kl: float


@dataclass(frozen=True)
class ScoredCandidate:
    """A candidate with its held-out KL before any training, in nats per token, and whether it was distilled afterwards."""

    architecture: Architecture
    kl_undistilled: float
    distilled: bool


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    `ranking` has the candidates that were distilled to the end, lowest held-out KL first; `winner` is the architecture to go
    on with and `reason` the sentence that says why; `failures` has a reason per candidate that did not finish. `stopped` are
    the candidates that a rung stopped, the furthest first. `forward` has every candidate's KL before training, lowest first;
    None where not all were scored. `stability` says how well earlier measures predict the ranking, and `saved` is the share
    of the training steps that stopping saved. `table` is the ranking as a pandas data frame.
    """

    ranking: list[RankedCandidate] = field(repr=False)
    winner: Architecture
    reason: str
    failures: dict[Architecture, str] = field(repr=False)
    stopped: list[StoppedCandidate] = field(repr=False)
    forward: list[ScoredCandidate] | None = field(repr=False)
    stability: list[MeasureStability] = field(repr=False)
    saved: float

    @property
    def table(self) -> pd.DataFrame:
        """The ranking as a pandas data frame, a row per candidate: "architecture" as text, a column per axis, the fields of
        `RankedCandidate`, and two columns per benchmark, its name for the score and that with "_stderr"; NaN where a
        candidate has none."""
        import pandas as pd

        axes = axes_present(candidate.architecture for candidate in self.ranking)
        table = pd.DataFrame([_row(candidate, axes) for candidate in self.ranking])
        unknown = [name for name in ("memory_bytes", "latency_ms") if table[name].isna().all()]
        return table.drop(columns=unknown).astype({"kl_difference_stderr": float})


def _row(candidate: RankedCandidate, axes: tuple[PrunableAxis, ...]) -> dict[str, Any]:
    values = dict(vars(candidate))
    architecture, benchmarks = values.pop("architecture"), values.pop("benchmarks")
    sizes = {axis.name: getattr(architecture, axis.name) for axis in axes}
    row = {"rank": values.pop("rank"), "architecture": str(architecture), **sizes, **values}
    for score in benchmarks:
        row |= {score.task: score.value, f"{score.task}_stderr": score.stderr}
    return row
