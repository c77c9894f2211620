"""Ranking candidates by held-out KL on the same rows, with the uncertainty of each difference to the best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from minitron.architecture import Architecture


@dataclass(frozen=True)
class SearchResult:
    """`ranking` has a row per finished candidate, best first; `failures` a reason per candidate that did not finish."""

    ranking: pd.DataFrame
    winner: Architecture
    failures: dict[str, str]


def rank(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per candidate, sorted by `kl`: its numbers, its KL undistilled and distilled, and `kl_difference` to the
    best with `kl_difference_stderr`, the standard error of the paired difference over held-out rows (nats per token)."""
    ordered = sorted(results, key=lambda result: result["kl"])
    best = ordered[0]["per_row_kl"]
    rows = []
    for position, result in enumerate(ordered, start=1):
        differences = [mine - theirs for mine, theirs in zip(result["per_row_kl"], best, strict=True)]
        rows.append(
            {
                "rank": position,
                "architecture": str(Architecture.from_dict(result["architecture"])),
                **{
                    name: result["architecture"][name]
                    for name in ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
                },
                "parameters": result["parameters"],
                "kl_undistilled": result["kl_undistilled"],
                "kl": result["kl"],
                "kl_difference": statistics.fmean(differences),
                "kl_difference_stderr": _stderr(differences),
                "loss": result["loss"],
                "top1_agreement": result["top1_agreement"],
                "tokens": result["tokens"],
                "seconds": result["seconds"],
            }
        )
    return pd.DataFrame(rows)


def _stderr(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
