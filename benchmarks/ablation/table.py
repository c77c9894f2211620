"""The table of an ablation: means over seeds, paired differences, and whether their direction is that of the papers."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks.ablation.plan import ARMS, COMPARISONS, Comparison, Study
from benchmarks.ablation.work import agreement, result_path


def markdown(folder: Path, study: Study, hardware: str, command: str) -> str:
    """Both tables, with the model, the data and the hardware of the measurement."""
    results = {
        name: [json.loads(result_path(folder, arm, seed).read_text()) for seed in range(study.size.seeds)]
        for name, arm in ARMS.items()
    }
    size = study.size
    lines = [
        f"`{command}` on {hardware}: {size.tokens:,} training tokens for every student, {size.seeds} seeds (order",
        f"of the rows, calibration rows, random weights), held-out rows: {size.heldout_rows} of {size.seq_length} tokens.",
        "Loss and KL to its own teacher in nats per token; ± is the standard deviation over seeds.",
        "",
        "| student | parameters | loss pruned | loss distilled | KL pruned | KL distilled |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, runs in results.items():
        cells = [_spread([run[when][what] for run in runs]) for what in ("loss", "kl") for when in ("before", "after")]
        lines.append(f"| {ARMS[name].what} | {runs[0]['parameters']:,} | {' | '.join(cells)} |")
    lines += [
        "",
        "Differences of the held-out loss, first minus second, paired by seed; ± is the 95 % interval of their mean (Student's",
        "t). Below zero the first is better.",
        "",
        "| question | before distillation | after | the papers | direction |",
        "|---|---:|---:|---|---|",
    ]
    lines += [_row(comparison, results) for comparison in COMPARISONS]
    alike = [f"{axis} {rho:.3f} and {100 * same:.0f} %" for axis, (rho, same) in agreement(folder, size).items()]
    lines += [
        "",
        "Scores of the corrected teacher against the original's, rank correlation and share of the better half that is the",
    ]
    lines += [f"same: {', '.join(alike)}."]
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def _row(comparison: Comparison, results: dict[str, list[dict[str, Any]]]) -> str:
    first, second = results[comparison.first], results[comparison.second]
    (before, before_error), (after, after_error) = (
        _interval([a[when]["loss"] - b[when]["loss"] for a, b in zip(first, second, strict=True)])
        for when in ("before", "after")
    )
    return (
        f"| {comparison.question} | {before:+.3f} ± {before_error:.3f} | {after:+.3f} ± {after_error:.3f} "
        f"| {comparison.paper} | {direction(comparison, after, after_error)} |"
    )


def _interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval, which is infinite for a single seed."""
    count = len(values)
    if count < 2:
        return values[0], math.inf
    width = stats.t.ppf(0.975, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return statistics.fmean(values), float(width)


def direction(comparison: Comparison, difference: float, error: float) -> str:
    """Whether the measured difference (first minus second, with its 95 % confidence interval) agrees with the paper."""
    if math.isinf(error):
        return "one seed: no telling"
    apart = abs(difference) > error
    if comparison.better is None:
        return "disagrees: there is one" if apart else "agrees: none to be seen"
    if not apart:
        return "can't be told apart"
    better = comparison.first if difference < 0 else comparison.second
    return "agrees" if better == comparison.better else "disagrees"
