"""How early the order of the candidates is known: Kendall's tau to the final order, and what stopping early would cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from minitron_search.halving import kept, planned_steps
from minitron_search.tau import SETTLED, kendall_tau
from minitron_search.trial_store import TrialResult


@dataclass(frozen=True)
class MeasureStability:
    """How well an earlier measure predicts the final held-out KL of the `candidates` that were distilled to the end."""

    measure: str
    """"size" (the largest is best), "loss undistilled", "KL undistilled" or "KL at step N"."""
    step: int | None
    """Step of the measurement; None for the size, which needs none."""
    candidates: int
    tau: float | None
    """Kendall's tau to the final KL; None for fewer than two candidates."""
    regret: float
    """Final KL of the candidate that the measure puts first, minus the lowest final KL, in nats per token."""
    regret_kept: float
    """The same for the best of the share that the measure would keep: the cost of stopping the others there."""
    saved: float
    """Share of the training steps that would be saved by stopping the others there."""


def stability(results: Sequence[TrialResult], rungs: Sequence[int], keep: float = 0.5) -> list[MeasureStability]:
    """How well each earlier measure predicts the final held-out KL of `results`, the candidates that were distilled to the end.

    All of them were measured after each of the steps `rungs`; `keep` is the share that stopping there would keep.
    """
    final = [result.kl for result in results]
    steps = results[0].steps
    measures: list[tuple[str, int | None, Callable[[TrialResult], float]]] = [
        ("size", None, lambda result: -result.parameters),
        ("loss undistilled", 0, lambda result: result.loss_undistilled),
        ("KL undistilled", 0, lambda result: result.kl_undistilled),
    ]
    measures += [(f"KL at step {rung}", rung, partial(_kl_at, rung)) for rung in rungs]
    rows = []
    for name, step, measure in measures:
        values = [measure(result) for result in results]
        order = sorted(range(len(results)), key=lambda index: values[index])
        continuing = order[: kept(len(order), keep)]
        trained = planned_steps(len(results), steps, [step or 0], keep)
        rows.append(
            MeasureStability(
                measure=name,
                step=step,
                candidates=len(results),
                tau=kendall_tau(values, final) if len(results) > 1 else None,
                regret=final[order[0]] - min(final),
                regret_kept=min(final[index] for index in continuing) - min(final),
                saved=1 - trained / (len(results) * steps),
            )
        )
    return rows


def _kl_at(step: int, result: TrialResult) -> float:
    return result.rung_kl[step]


def settled(rows: Sequence[MeasureStability]) -> int | None:
    """The first step from which on every KL measurement in `rows` has a tau of at least 0.9; None if the last has less."""
    earliest = None
    for row in reversed([row for row in rows if row.measure.startswith("KL")]):
        if row.tau is None or row.tau < SETTLED:
            break
        earliest = row.step
    return earliest
