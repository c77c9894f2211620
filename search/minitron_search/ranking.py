"""Ranking candidates by held-out KL on the same rows: what can't be told apart from the best is tied, and the cheapest wins."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from minitron.architecture import Architecture
from minitron_search.trial import SHAPE

CONFIDENCE = 0.95  # two-sided; a difference that is not so sure tells nobody apart


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    `ranking` has a row per candidate that was distilled to the end, lowest held-out KL first (see `rank`); `winner` is the
    architecture to go on with and `reason` the sentence that says why; `failures` has a reason per candidate that did not
    finish. `stopped` are the candidates that a rung stopped, with the `step` and their held-out `kl` there. `forward` has
    every candidate's KL before training, lowest first, and whether it was `distilled`; None where not all were scored.
    `stability` says how well earlier measures predict the ranking (see `minitron_search.stability.stability`), and `saved`
    is the share of the training steps that stopping saved. `metrics` names the metric of each benchmark that is a column of
    the ranking.
    """

    ranking: pd.DataFrame
    winner: Architecture
    reason: str
    failures: dict[str, str]
    stopped: pd.DataFrame
    forward: pd.DataFrame | None
    stability: pd.DataFrame
    saved: float
    metrics: dict[str, str] = field(default_factory=dict)


def rank(results: Sequence[dict[str, Any]], seq_length: int) -> pd.DataFrame:
    """One row per candidate, sorted by `kl`, the mean held-out KL to the teacher in nats per token.

    `results` are those of `minitron_search.trial.run_trial`, all measured on the same held-out rows of `seq_length`
    tokens. `kl_difference` is the mean paired difference to the best over those rows and `kl_difference_stderr` its
    standard error; `tied` are the best and those whose difference is less than Student's t allows at 95 % confidence with
    that many rows; `winner` is the tied candidate with the fewest `flops_per_token` (forward, in a sequence of
    `seq_length`), then the fewest `parameters`.

    The unit is the row. A row holds parts of one or several documents, and a document longer than a row goes on in the
    next: rows of long documents are not quite independent, and the standard error is then a little too small. That the
    best was itself chosen on these rows is not corrected for.
    """
    ordered = sorted(results, key=lambda result: result["kl"])
    rows = [_row(position, result, ordered[0], seq_length) for position, result in enumerate(ordered, start=1)]
    table = pd.DataFrame(rows)
    cheapest = table[table["tied"]].sort_values(["flops_per_token", "parameters", "kl"], kind="stable").index[0]
    return table.assign(winner=table.index == cheapest)


def reason(ranking: pd.DataFrame) -> str:
    """Why the winner of `rank` won, as a sentence."""
    best, winner = ranking.iloc[0], ranking[ranking["winner"]].iloc[0]
    tied = int(ranking["tied"].sum())
    if len(ranking) == 1:
        return "the only candidate that was distilled to the end"
    if math.isnan(best["kl_difference_stderr"]):
        return "lowest held-out KL; one held-out row says nothing about how certain that is"
    if tied == 1:
        return f"lowest held-out KL, at {CONFIDENCE:.0%} confidence"
    shared = f"{tied} candidates can't be told apart by their held-out KL at {CONFIDENCE:.0%} confidence"
    cost = f"{winner['flops_per_token'] / 1e9:.3g} GFLOPs per token and {winner['parameters']:,} parameters"
    if winner["rank"] == 1:
        return f"{shared}; this one has the lowest and is the cheapest of them, {cost}"
    more = f"its KL is {winner['kl_difference']:.3f} ± {winner['kl_difference_stderr']:.3f} above the lowest"
    return f"{shared}; this one is the cheapest of them, {cost}, and {more}"


def _row(position: int, result: dict[str, Any], best: dict[str, Any], seq_length: int) -> dict[str, Any]:
    architecture = Architecture.from_dict(result["architecture"])
    differences = [mine - theirs for mine, theirs in zip(result["per_row_kl"], best["per_row_kl"], strict=True)]
    difference, error = statistics.fmean(differences), _stderr(differences)
    return {
        "rank": position,
        "architecture": str(architecture),
        **{name: result["architecture"][name] for name in SHAPE},
        "parameters": result["parameters"],
        "flops_per_token": architecture.flops_per_token(seq_length),
        "kl_undistilled": result["kl_undistilled"],
        "kl": result["kl"],
        "kl_difference": difference,
        "kl_difference_stderr": error,
        "tied": result is best or (len(differences) > 1 and difference <= t_quantile(len(differences) - 1) * error),
        "loss": result["loss"],
        "top1_agreement": result["top1_agreement"],
        "tokens": result["tokens"],
        "seconds": result["seconds"],
    }


def _stderr(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


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


def with_columns(result: SearchResult, columns: Mapping[str, Mapping[str, float | None]]) -> SearchResult:
    """The same result with more columns in its ranking, each from architecture, as text, to value; NaN where it has none."""
    names = result.ranking["architecture"]
    added = {name: [values.get(text) for text in names] for name, values in columns.items()}
    return replace(result, ranking=result.ranking.assign(**added).astype(dict.fromkeys(added, float)))


def pareto(costs: Sequence[float], kl: Sequence[float]) -> list[int]:
    """Positions of the candidates that none other beats in both, the cheapest first."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], kl[i])):
        if not front or kl[index] < kl[front[-1]]:
            front.append(index)
    return front
