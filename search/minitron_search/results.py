"""The result of a search."""

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
    """A candidate that was stopped at a rung, after `step` steps, with its held-out KL before training and at the rung, in nats
    per token."""

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
    """The result of a search.

    `ranking` has the candidates that were distilled to the end, lowest held-out KL first; `winner` is the chosen architecture
    and `reason` a sentence that says why; `failures` has a reason per candidate that did not finish. `stopped` are the
    candidates that were stopped at a rung, those of the last rung first. `forward` has every candidate's KL before training,
    lowest first; None if not all were scored. `stability` says how well earlier measurements predict the ranking, and `saved`
    is the share of the training steps that was saved by stopping candidates. `table` is the ranking as a pandas data frame.
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
        """The ranking as a pandas data frame with a row per candidate: "architecture" as text, a column per axis, the fields of
        `RankedCandidate`, and two columns per benchmark, NAME for the score and NAME_stderr for its standard error; NaN for
        candidates without a score."""
        import pandas as pd

        axes = axes_present(candidate.architecture for candidate in self.ranking)
        table = pd.DataFrame([_row(candidate, axes) for candidate in self.ranking])
        missing = [name for name in ("memory_bytes", "latency_ms", "token_latency_ms") if table[name].isna().all()]
        return table.drop(columns=missing).astype({"kl_difference_stderr": float})


def _row(candidate: RankedCandidate, axes: tuple[PrunableAxis, ...]) -> dict[str, Any]:
    values = dict(vars(candidate))
    architecture, benchmarks = values.pop("architecture"), values.pop("benchmarks")
    sizes = {axis.name: getattr(architecture, axis.name) for axis in axes}
    row = {"rank": values.pop("rank"), "architecture": str(architecture), **sizes, **values}
    for score in benchmarks:
        row |= {score.task: score.value, f"{score.task}_stderr": score.stderr}
    return row
