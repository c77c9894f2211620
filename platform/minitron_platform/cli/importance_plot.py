"""A plot of importance scores: blocks of layers in the upper row, single units in the lower row."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from minitron.importance.compare import axes
from minitron.importance.scores import ImportanceScores
from minitron_platform.cli.importance_tables import measured, title

GREEN = "#76b900"
GREY = "#9aa5b1"
DARK = "#52606d"
UNITS = {"loss": "nats per token", "logit_error": "relative squared error", "cosine": ""}


def draw(scores: ImportanceScores) -> bytes:
    """Plot `scores`; returns a PNG.

    Upper row: a panel per metric, with a curve per block size over the first layer of the block; a dot marks the minimum.
    Lower row: a panel each for heads, neurons, experts and channels, with a curve per layer of the scores in descending order,
    divided by the highest.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics: dict[str, list[int]] = {}
    for metric, size in measured(scores):
        metrics.setdefault(metric, []).append(size)
    ranked = axes(scores)
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        columns = max(len(metrics), len(ranked))
        figure = pyplot.figure(figsize=(3.9 * columns, 7), layout="constrained")
        upper, lower = figure.subfigures(2, 1)
        for axis, (metric, sizes) in zip(
            upper.subplots(1, len(metrics), squeeze=False)[0], metrics.items(), strict=True
        ):
            _plot_blocks(axis, scores, metric, sizes)
        panels = lower.subplots(1, len(ranked), squeeze=False)[0]
        for axis, (name, values) in zip(panels, ranked.items(), strict=True):
            _plot_units(axis, name, values.numpy())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        pyplot.close(figure)
    return buffer.getvalue()


def _plot_blocks(axis: Any, scores: ImportanceScores, metric: str, sizes: list[int]) -> None:
    for size, colour in zip(sizes, _shades(len(sizes)), strict=True):
        values = scores.blocks(size, metric)
        least = int(values.argmin())
        axis.plot(
            range(len(values)),
            values,
            color=colour,
            marker=".",
            markersize=3,
            label=f"{size} layers" if size == sizes[-1] > 1 else str(size),
        )
        axis.plot(least, values[least], color=colour, marker="o", markersize=7)
    if metric in ("loss", "logit_error"):
        _log_scale(axis)  # the first and the last layers score far higher than the others
    axis.set_title(title(metric), loc="left", fontsize=10)
    axis.set_xlabel("first layer removed")
    axis.set_ylabel(UNITS.get(metric, "accuracy"))
    axis.xaxis.get_major_locator().set_params(integer=True)
    position = {"loc": "lower right", "bbox_to_anchor": (1, 0.98), "ncols": len(sizes)}  # beside the title
    axis.legend(frameon=False, handlelength=1, columnspacing=1, **position)


def _plot_units(axis: Any, name: str, values: np.ndarray) -> None:
    curves = -np.sort(-values, axis=1)
    curves = curves / curves[:, :1].clip(min=np.finfo(np.float32).tiny)
    for curve, colour in zip(curves, _shades(len(curves)), strict=True):
        axis.plot(np.arange(1, len(curve) + 1), curve, color=colour, linewidth=1)
    _log_scale(axis)
    lines = "" if len(curves) == 1 else " · dark: first layer, green: last"
    axis.set_title(f"{name}, best first{lines}", loc="left", fontsize=10)
    axis.set_xlabel("rank")
    axis.set_ylabel("score, best = 1")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _log_scale(axis: Any) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")


def _shades(count: int) -> list[Any]:
    """`count` colours from dark grey to green."""
    from matplotlib.colors import LinearSegmentedColormap

    blend = LinearSegmentedColormap.from_list("minitron", [DARK, GREY, GREEN] if count > 1 else [GREEN, GREEN])
    return [blend(share) for share in np.linspace(0, 1, count)]
