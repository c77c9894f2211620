"""Ranking candidates by held-out KL on the same rows: what can't be told apart from the best is tied, and the cheapest wins."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from minitron.architecture import Architecture

STANDARD_ERRORS = 2.0  # a smaller difference tells nobody apart
SHAPE = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    `ranking` has a row per candidate that was distilled to the end, lowest held-out KL first (see `rank`); `winner` is the
    architecture to go on with and `reason` the sentence that says why; `failures` has a reason per candidate that did not
    finish. `stopped` are the candidates that a rung stopped, with the `step` and their held-out `kl` there. `forward` has
    every candidate's KL before training, lowest first, and whether it was `distilled`; None where not all were scored.
    `stability` says how well earlier measures predict the ranking (see `minitron_search.stability.stability`), and `saved`
    is the share of the training steps that stopping saved.
    """

    ranking: pd.DataFrame
    winner: Architecture
    reason: str
    failures: dict[str, str]
    stopped: pd.DataFrame
    forward: pd.DataFrame | None
    stability: pd.DataFrame
    saved: float


def rank(results: Sequence[dict[str, Any]], seq_length: int) -> pd.DataFrame:
    """One row per candidate, sorted by `kl`, the mean held-out KL to the teacher in nats per token.

    `results` are those of `minitron_search.trial.run_trial`, all measured on the same held-out rows of `seq_length`
    tokens. `kl_difference` is the mean paired difference to the best over those rows and `kl_difference_stderr` its
    standard error; `tied` are the best and those whose difference is within 2 standard errors; `winner` is the tied
    candidate with the fewest `flops_per_token` (forward, in a sequence of `seq_length`), then the fewest `parameters`.
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
        return f"lowest held-out KL, by more than {STANDARD_ERRORS:g} standard errors"
    shared = f"{tied} candidates can't be told apart within {STANDARD_ERRORS:g} standard errors of their held-out KL"
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
        "tied": result is best or difference <= STANDARD_ERRORS * error,
        "loss": result["loss"],
        "top1_agreement": result["top1_agreement"],
        "tokens": result["tokens"],
        "seconds": result["seconds"],
    }


def _stderr(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def pareto(costs: Sequence[float], kl: Sequence[float]) -> list[int]:
    """Positions of the candidates that none other beats in both, the cheapest first."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], kl[i])):
        if not front or kl[index] < kl[front[-1]]:
            front.append(index)
    return front
