"""Importance scores as tables for a terminal. Layers are numbered from 0, as in the checkpoint."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table
from torch import Tensor

from minitron.importance.compare import axes, check_comparable, kept_overlap, rank_correlation, top_half_share
from minitron.importance.scores import ImportanceScores

LONGEST_PART = 120  # characters of one entry of the provenance
TITLES = {"loss": "loss without", "logit_error": "logit error without", "cosine": "1 - cosine"}


def title(metric: str) -> str:
    """Heading of a metric of removed layers."""
    return TITLES.get(metric, f"{metric.removeprefix('task:')} lost")


def provenance(scores: ImportanceScores) -> str:
    """A line that says which model, data and metrics the scores were computed with."""
    parts = [f"{key} {value}"[:LONGEST_PART] for key, value in scores.provenance.items() if key != "layers"]
    scorings = scores.provenance.get("layers")
    for scoring in scorings if isinstance(scorings, list) else []:
        parts += _scoring_part(scoring)
    return " · ".join(parts) or "the file does not say what the scores were computed from"


def _scoring_part(scoring: Any) -> list[str]:
    """How layers were scored, as text; nothing for what another program wrote there."""
    task = scoring.get("task") if isinstance(scoring, dict) else None
    if isinstance(task, dict):
        return [f"layers by {task.get('name')} ({task.get('limit') or 'all'} documents)"[:LONGEST_PART]]
    if isinstance(scoring, dict) and "metric" in scoring:
        return [f"layers by {scoring['metric']} ({scoring.get('rows') or 'all'} rows)"[:LONGEST_PART]]
    return []


def measured(scores: ImportanceScores) -> list[tuple[str, int]]:
    """The pairs (metric, block size) to show.

    The cosine is known for every block size; it is shown for single layers and the sizes that another metric was measured for,
    or for powers of two if there is no other metric.
    """
    num_layers = len(scores.similarity) - 1
    sizes = {size for blocks in scores.removal.values() for size in blocks}
    powers = {2**power for power in range(num_layers.bit_length()) if 2**power <= max(1, num_layers // 2)}
    cosine = [("cosine", size) for size in sorted(sizes | {1} if sizes else powers)]
    return cosine + [(metric, size) for metric, blocks in scores.removal.items() for size in sorted(blocks)]


def layers(scores: ImportanceScores) -> Table:
    """The importance of every single layer by every metric, and the step at which iterative removal takes it."""
    table = _table("Single layers", "layer")
    metrics = [metric for metric, size in measured(scores) if size == 1]
    for metric in metrics:
        table.add_column(title(metric), justify="right")
        if metric == "loss":
            table.add_column("perplexity", justify="right")
    orders = [(metric, size, order) for metric, sizes in scores.orders.items() for size, order in sizes.items()]
    for metric, size, _ in orders:
        table.add_column(f"removed, by {metric}" + (f", {size} at a time" if size > 1 else ""), justify="right")
    for layer in range(len(scores.similarity) - 1):
        cells = [str(layer)]
        for metric in metrics:
            value = float(scores.blocks(1, metric)[layer])
            cells += [_number(value), f"{math.exp(value):,.2f}"] if metric == "loss" else [_number(value)]
        for _, size, order in orders:
            cells.append(f"{order.index(layer) // size + 1}." if layer in order else "kept")
        table.add_row(*cells)
    return table


def blocks(scores: ImportanceScores) -> Table:
    """The least and the most important contiguous block, for every metric and block size."""
    table = _table("Least important blocks", "metric", "layers", "block", "importance", "most important")
    for metric, size in measured(scores):
        values = scores.blocks(size, metric)
        least, most = int(values.argmin()), int(values.argmax())
        table.add_row(
            title(metric),
            str(size),
            _span(least, size),
            _number(float(values[least])),
            f"{_number(float(values[most]))} ({_span(most, size)})",
        )
    return table


def units(scores: ImportanceScores) -> Table:
    """How concentrated the scores of heads, neurons, channels and experts are: the upper half's share of the total score."""
    table = _table("Share of the total score in the upper half", "axis", "units", "mean", "lowest", "highest")
    for name, values in axes(scores).items():
        share = top_half_share(values[values.sum(dim=1) > 0])  # experts that got no token have no scores
        row = [f"{100 * float(part):.1f} %" for part in (share.mean(), share.min(), share.max())]
        table.add_row(name, f"{values.shape[1]:,}", *(row if len(values) > 1 else [row[0], "", ""]))
    return table


def agreement(first: ImportanceScores, second: ImportanceScores) -> Table:
    """Rank correlation of two calibrations, and how many units of the upper half they have in common.

    Raises InputError unless both are of the same architecture.
    """
    check_comparable(first, second)
    table = _table("Agreement", "axis", "Spearman, mean", "lowest", "upper half in common, mean", "lowest")
    other = axes(second)
    for name, values in axes(first).items():
        _add_agreement(table, name, list(zip(values, other[name], strict=True)))
    _add_agreement(table, "layers (1 - cosine)", [(first.blocks(1, "cosine"), second.blocks(1, "cosine"))])
    return table


def _add_agreement(table: Table, name: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
    pairs = [(a, b) for a, b in pairs if a.any() and b.any()]  # experts that got no token have no scores
    ranks = [rank_correlation(a, b) for a, b in pairs]
    overlaps = [kept_overlap(a, b) for a, b in pairs]
    cells = [f"{sum(ranks) / len(ranks):.3f}", f"{min(ranks):.3f}"]
    cells += [f"{100 * sum(overlaps) / len(overlaps):.1f} %", f"{100 * min(overlaps):.1f} %"]
    table.add_row(name, *(cells if len(pairs) > 1 else [cells[0], "", cells[2], ""]))


def block_agreement(first: ImportanceScores, second: ImportanceScores) -> Table:
    """The least important block of both calibrations, for every metric and block size that both have."""
    table = _table("Least important blocks", "metric", "layers", "first", "second", "same", "Spearman")
    for metric, size in measured(first):
        if (metric, size) not in measured(second):
            continue
        a, b = first.blocks(size, metric), second.blocks(size, metric)
        starts = int(a.argmin()), int(b.argmin())
        same = "yes" if starts[0] == starts[1] else "no"
        spans = [_span(start, size) for start in starts]
        table.add_row(title(metric), str(size), *spans, same, f"{rank_correlation(a, b):.3f}" if len(a) > 1 else "")
    return table


def _table(name: str, first: str, *others: str) -> Table:
    table = Table(title=name, title_justify="left")
    table.add_column(first)
    for other in others:
        table.add_column(other, justify="right")
    return table


def _span(start: int, size: int) -> str:
    return str(start) if size == 1 else f"{start}-{start + size - 1}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"
