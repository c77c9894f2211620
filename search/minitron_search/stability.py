"""How early the order of the candidates was known: Kendall's tau to the final order, and what stopping early costs."""

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
    """Of the measurement; None where nothing of the candidate is measured."""
    candidates: int
    tau: float | None
    """Kendall's tau to the final KL; None for fewer than two candidates."""
    regret: float
    """The final KL of the measure's best less the lowest, in nats per token."""
    regret_kept: float
    """The same for the best of the share that the measure puts first: what stopping the others there costs."""
    saved: float
    """Share of the training steps that stopping the others there saves."""


def stability(results: Sequence[TrialResult], rungs: Sequence[int], keep: float = 0.5) -> list[MeasureStability]:
    """How well each earlier measure predicts the final held-out KL, from the candidates that were distilled to the end and
    measured after the steps `rungs`; `keep` is the share that stopping there would have kept."""
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
        going = order[: kept(len(order), keep)]
        trained = planned_steps(len(results), steps, [step or 0], keep)
        rows.append(
            MeasureStability(
                measure=name,
                step=step,
                candidates=len(results),
                tau=kendall_tau(values, final) if len(results) > 1 else None,
                regret=final[order[0]] - min(final),
                regret_kept=min(final[index] for index in going) - min(final),
                saved=1 - trained / (len(results) * steps),
            )
        )
    return rows


def _kl_at(step: int, result: TrialResult) -> float:
    return result.rung_kl[step]


def settled(rows: Sequence[MeasureStability]) -> int | None:
    """The earliest step from which on every KL of `stability` has a tau of at least 0.9; None if not even the last has."""
    earliest = None
    for row in reversed([row for row in rows if row.measure.startswith("KL")]):
        if row.tau is None or row.tau < SETTLED:
            break
        earliest = row.step
    return earliest
