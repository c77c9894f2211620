"""Ranks candidates by held-out KL on the same rows: of all that cannot be told apart from the best, the cheapest wins."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from minitron.architecture import Architecture
from minitron.evaluation.metrics import Metric, task_metric
from minitron_search.trial_store import TrialResult

CONFIDENCE = 0.95  # two-sided, of the test that tells two candidates apart


@dataclass(frozen=True)
class BenchmarkScore:
    """A candidate's score on a benchmark; `value` and `stderr` are as lm-eval gives them: accuracies are between 0 and 1."""

    task: str
    metric: str
    value: float
    stderr: float | None
    measured_on: str = ""
    """In words, with the limit: "0-shot, first 40 of 1,172 documents of test"; empty in results of earlier versions."""

    @property
    def shown_as(self) -> Metric:
        """Unit and format of `value` and `stderr`."""
        return task_metric(self.task, self.metric)

    @property
    def text(self) -> str:
        """The score and its standard error, without metric and unit, as `minitron.evaluation.scores.Score` has it."""
        return self.shown_as.with_error(self.value, self.stderr)


@dataclass(frozen=True)
class RankedCandidate:
    """A candidate that was distilled to the end, with its rank among the others (see `rank`).

    KL and loss are means over the held-out rows, in nats per token. `tokens` is the number of training tokens, `seconds` the
    time in the process that finished the trial. `memory_bytes`, `latency_ms` and `token_latency_ms` are None, and `benchmarks`
    empty, if they were not calculated or measured.
    """

    rank: int
    """Rank by `kl`, from 1."""
    architecture: Architecture
    parameters: int
    flops_per_token: int
    """FLOPs per token of a forward pass over a sequence as long as the held-out rows."""
    kl_undistilled: float
    kl: float
    kl_difference: float
    """Mean of the paired differences to the best candidate over the held-out rows."""
    kl_difference_stderr: float | None
    """Standard error of that mean; None if there is one row only."""
    tied: bool
    """Whether it cannot be told apart from the best, or is the best."""
    winner: bool
    loss: float
    top1_agreement: float
    tokens: int
    seconds: float
    memory_bytes: int | None = None
    """Weights and KV cache in inference, at the batch and context of the limits."""
    latency_ms: float | None = None
    """Time to first token in inference, at the batch and context of the limits."""
    benchmarks: tuple[BenchmarkScore, ...] = ()
    token_latency_ms: float | None = None
    """Time between two tokens in inference, at the batch and context of the limits."""

    def score(self, task: str) -> BenchmarkScore | None:
        """The score on a benchmark; None if there is none."""
        return next((score for score in self.benchmarks if score.task == task), None)


def rank(results: Sequence[TrialResult], seq_length: int) -> list[RankedCandidate]:
    """The candidates sorted by `kl`, the mean held-out KL to the teacher in nats per token.

    All of `results` are measured on the same held-out rows of `seq_length` tokens. `kl_difference` is the mean over the rows of
    the paired difference to the best candidate. A candidate is `tied` with the best if this mean does not differ from zero at
    95 % confidence in Student's t-test. `winner` is the tied candidate with the fewest `flops_per_token`, then the fewest
    `parameters`.

    The test takes rows as independent. A row holds parts of one or several documents, and a document longer than a row
    continues in the next: with long documents rows are not quite independent, and the standard error is a little too small.
    That the best candidate was itself chosen on these rows is not corrected for.
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
    """Why the winner in `ranking` was chosen, as a sentence."""
    winner = winner_of(ranking)
    tied = sum(candidate.tied for candidate in ranking)
    if len(ranking) == 1:
        return "the only candidate that was distilled to the end"
    if ranking[0].kl_difference_stderr is None:
        return "lowest held-out KL; one held-out row says nothing about how certain that is"
    if tied == 1:
        return f"lowest held-out KL, at {CONFIDENCE:.0%} confidence"
    tied_text = f"{tied} candidates can't be told apart by their held-out KL at {CONFIDENCE:.0%} confidence"
    cost = f"{winner.flops_per_token / 1e9:.3g} GFLOPs per token and {winner.parameters:,} parameters"
    if winner.rank == 1:
        return f"{tied_text}; this one has the lowest and is the cheapest of them, {cost}"
    more = f"its KL is {winner.kl_difference:.3f} ± {winner.kl_difference_stderr:.3f} above the lowest"
    return f"{tied_text}; this one is the cheapest of them, {cost}, and {more}"


def _paired_difference(result: TrialResult, best: TrialResult) -> tuple[float, float | None, bool]:
    """Mean difference to the best over the rows, its standard error, and whether the two are tied."""
    differences = [own - lowest for own, lowest in zip(result.per_row_kl, best.per_row_kl, strict=True)]
    mean = statistics.fmean(differences)
    rows = len(differences)
    if rows < 2:
        return mean, None, result is best
    error = statistics.stdev(differences) / math.sqrt(rows)
    return mean, error, result is best or mean <= t_quantile(rows - 1) * error


def t_quantile(freedom: int) -> float:
    """The quantile of Student's t with `freedom` degrees of freedom at two-sided CONFIDENCE.

    One degree of freedom has a closed form; for more, the expansion around the normal quantile (Abramowitz and Stegun 26.7.5)
    is within 1 % at 95 % confidence.
    """
    if freedom == 1:
        return math.tan(math.pi * CONFIDENCE / 2)
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
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
    """Indices of the candidates that no other candidate beats in both cost and KL, cheapest first."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], kl[i])):
        if not front or kl[index] < kl[front[-1]]:
            front.append(index)
    return front
