"""How early the order of the candidates was known: Kendall's tau to the final order, and what stopping early costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pandas as pd

from minitron_search.halving import kept, planned_steps
from minitron_search.tau import SETTLED, kendall_tau


def stability(results: Sequence[dict[str, Any]], rungs: Sequence[int], keep: float = 0.5) -> pd.DataFrame:
    """How well each earlier measure predicts the final held-out KL, a row per measure, from the candidates that were distilled
    to the end (`results`, those of `minitron_search.trial.run_trial`) and measured after the steps `rungs`.

    `measure` is "size" (the largest is best), "loss undistilled", "KL undistilled" or "KL at step N"; `step` its step (NaN
    where nothing is measured of the candidate). `tau` is Kendall's to the final KL over `candidates`; `regret` the final KL
    of the measure's best less the lowest; `regret_kept` the same for the best of the share `keep` that it puts first, which
    is what stopping the others there costs, and `saved` the share of training steps that this saves.
    """
    final = [result["kl"] for result in results]
    steps = results[0]["config"]["steps"]
    measures: list[tuple[str, float, Callable[[dict[str, Any]], float]]] = [
        ("size", math.nan, lambda result: -result["parameters"]),
        ("loss undistilled", 0, lambda result: result["loss_undistilled"]),
        ("KL undistilled", 0, lambda result: result["kl_undistilled"]),
    ]
    measures += [(f"KL at step {rung}", rung, partial(_kl_at, rung)) for rung in rungs]
    rows = []
    for name, step, measure in measures:
        values = [measure(result) for result in results]
        order = sorted(range(len(results)), key=lambda index: values[index])
        going = order[: kept(len(order), keep)]
        trained = planned_steps(len(results), steps, [int(step) if step > 0 else 0], keep)
        rows.append(
            {
                "measure": name,
                "step": step,
                "candidates": len(results),
                "tau": kendall_tau(values, final),
                "regret": final[order[0]] - min(final),
                "regret_kept": min(final[index] for index in going) - min(final),
                "saved": 1 - trained / (len(results) * steps),
            }
        )
    return pd.DataFrame(rows)


def _kl_at(step: int, result: dict[str, Any]) -> float:
    return next(rung["kl"] for rung in result["rungs"] if rung["step"] == step)


def settled(table: pd.DataFrame) -> int | None:
    """The earliest step from which on every KL of `stability` has a tau of at least 0.9; None if not even the last has."""
    found = None
    for row in reversed(table[table["measure"].str.startswith("KL")].to_dict("records")):
        if not row["tau"] >= SETTLED:
            break
        found = int(row["step"])
    return found
