"""Ranking candidates by held-out KL on the same rows: what can't be told apart from the best is tied, and the cheapest wins."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from minitron.architecture import Architecture
from minitron.evaluation.metrics import Metric, task_metric
from minitron_search.trial_store import TrialResult

CONFIDENCE = 0.95  # two-sided; a smaller difference tells no candidates apart


@dataclass(frozen=True)
class BenchmarkScore:
    """A candidate's score on a benchmark, `value` and `stderr` as lm-eval gives them: shares of 1 for accuracies."""

    task: str
    metric: str
    value: float
    stderr: float | None

    @property
    def shown_as(self) -> Metric:
        """Unit and format of `value` and `stderr`."""
        return task_metric(self.task, self.metric)


@dataclass(frozen=True)
class RankedCandidate:
    """A candidate that was distilled to the end, and its place among the others (see `rank`).

    KL and loss are means over the held-out rows, in nats per token. `tokens` are those of its training, `seconds` those of
    the process that ended it. `memory_bytes`, `latency_ms` and `benchmarks` are there where they were worked out or measured.
    """

    rank: int
    """From 1, by `kl`."""
    architecture: Architecture
    parameters: int
    flops_per_token: int
    """Of a forward pass in a sequence as long as the held-out rows."""
    kl_undistilled: float
    kl: float
    kl_difference: float
    """Mean paired difference to the best over the held-out rows."""
    kl_difference_stderr: float | None
    """Standard error of that; None with one row."""
    tied: bool
    """Whether it can't be told apart from the best."""
    winner: bool
    loss: float
    top1_agreement: float
    tokens: int
    seconds: float
    memory_bytes: int | None = None
    """Weights and KV cache where it is to serve."""
    latency_ms: float | None = None
    """Time to the first token where it is to serve."""
    benchmarks: tuple[BenchmarkScore, ...] = ()

    def score(self, task: str) -> BenchmarkScore | None:
        """Its score on a benchmark, if it has one."""
        return next((score for score in self.benchmarks if score.task == task), None)


def rank(results: Sequence[TrialResult], seq_length: int) -> list[RankedCandidate]:
    """The candidates sorted by `kl`, the mean held-out KL to the teacher in nats per token.

    All of `results` are measured on the same held-out rows of `seq_length` tokens. `kl_difference` is the mean paired
    difference to the best over those rows; `tied` are the best and those whose difference is less than Student's t allows at
    95 % confidence with that many rows; `winner` is the tied candidate with the fewest `flops_per_token`, then the fewest
    `parameters`.

    The unit is the row. A row holds parts of one or several documents, and a document longer than a row continues in the
    next: rows of long documents are not quite independent, and the standard error is then a little too small. That the
    best was itself chosen on these rows is not corrected for.
    """
    ordered = sorted(results, key=lambda result: result.kl)
    best = ordered[0]
    flops = [result.architecture.flops_per_token(seq_length) for result in ordered]
    differences = [_paired_difference(result, best) for result in ordered]
    tied = [index for index, (_, _, is_tied) in enumerate(differences) if is_tied]
    cheapest = min(tied, key=lambda index: (flops[index], ordered[index].parameters, ordered[index].kl))
    return [
        RankedCandidate(
            rank=index + 1,
            architecture=result.architecture,
            parameters=result.parameters,
            flops_per_token=flops[index],
            kl_undistilled=result.kl_undistilled,
            kl=result.kl,
            kl_difference=differences[index][0],
            kl_difference_stderr=differences[index][1],
            tied=differences[index][2],
            winner=index == cheapest,
            loss=result.loss,
            top1_agreement=result.top1_agreement,
            tokens=result.tokens,
            seconds=result.seconds,
        )
        for index, result in enumerate(ordered)
    ]


def winner_of(ranking: Sequence[RankedCandidate]) -> RankedCandidate:
    """The candidate that the search chose."""
    return next(candidate for candidate in ranking if candidate.winner)


def reason(ranking: Sequence[RankedCandidate]) -> str:
    """Why the winner of `rank` won, as a sentence."""
    winner = winner_of(ranking)
    tied = sum(candidate.tied for candidate in ranking)
    if len(ranking) == 1:
        return "the only candidate that was distilled to the end"
    if ranking[0].kl_difference_stderr is None:
        return "lowest held-out KL; one held-out row says nothing about how certain that is"
    if tied == 1:
        return f"lowest held-out KL, at {CONFIDENCE:.0%} confidence"
    shared = f"{tied} candidates can't be told apart by their held-out KL at {CONFIDENCE:.0%} confidence"
    cost = f"{winner.flops_per_token / 1e9:.3g} GFLOPs per token and {winner.parameters:,} parameters"
    if winner.rank == 1:
        return f"{shared}; this one has the lowest and is the cheapest of them, {cost}"
    more = f"its KL is {winner.kl_difference:.3f} ± {winner.kl_difference_stderr:.3f} above the lowest"
    return f"{shared}; this one is the cheapest of them, {cost}, and {more}"


def _paired_difference(result: TrialResult, best: TrialResult) -> tuple[float, float | None, bool]:
    """Mean difference over the rows, its standard error, and whether chance explains it."""
    differences = [mine - theirs for mine, theirs in zip(result.per_row_kl, best.per_row_kl, strict=True)]
    mean, rows = statistics.fmean(differences), len(differences)
    if rows < 2:
        return mean, None, result is best
    error = statistics.stdev(differences) / math.sqrt(rows)
    return mean, error, result is best or mean <= t_quantile(rows - 1) * error


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """How many standard errors a mean of `freedom` + 1 values is off at most, with two-sided `confidence`: Student's t by its
    expansion around the normal quantile (Abramowitz and Stegun 26.7.5), within 1 % from 2 degrees of freedom on at 95 %; the
    one degree has a closed form."""
    if freedom == 1:
        return math.tan(math.pi * confidence / 2)
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    return z + sum(
        term / freedom**power
        for power, term in enumerate(
            (
                (z**3 + z) / 4,
                (5 * z**5 + 16 * z**3 + 3 * z) / 96,
                (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
                (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
            ),
            start=1,
        )
    )


def pareto(costs: Sequence[float], kl: Sequence[float]) -> list[int]:
    """Positions of the candidates that none other beats in both, the cheapest first."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], kl[i])):
        if not front or kl[index] < kl[front[-1]]:
            front.append(index)
    return front
