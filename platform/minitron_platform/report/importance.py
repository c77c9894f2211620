"""Charts of importance scores in the report: layers, with those that were removed, and single units."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from minitron import storage
from minitron.architecture import Architecture
from minitron.importance import ImportanceScores
from minitron.importance.compare import axes, top_half_share
from minitron_platform.report.charts import QUIET, Chart, Mark, Row, colour, colours, number, one_view, view
from minitron_platform.stages.calibrate import CalibrateOutput

KEPT, REMOVED = "kept", "removed"
CURVE_POINTS = 80  # of each curve of units
SIZES = {"heads": "num_heads", "neurons": "intermediate_size", "channels": "hidden_size", "experts": "num_experts"}


class Importance:
    """The scores that a model was pruned by.

    calibrated: output of the stage that scored it. winner: the architecture that it was pruned to.
    """

    def __init__(self, model: str, calibrated: CalibrateOutput, winner: Architecture) -> None:
        self.model = model
        self.winner = winner
        self.scores = ImportanceScores.load(storage.fetch_file(calibrated.scores))
        self.removed = frozenset(calibrated.removed.get(str(winner.num_layers), ()))

    def layer_rows(self) -> list[Row]:
        """Every single layer with its importance, and whether it was removed."""
        return [
            {"layer": layer, "importance": float(value), "state": REMOVED if layer in self.removed else KEPT}
            for layer, value in enumerate(self.scores.layers)
        ]

    def layer_chart(self) -> Chart:
        """The importance of every single layer."""
        measured = "loss" if 1 in self.scores.removal.get("loss", {}) else "cosine"
        title = {"loss": "loss without it, nats per token", "cosine": "1 - cosine of its input and output"}[measured]
        rows = self.layer_rows()
        log = all(row["importance"] > 0 for row in rows)
        states = {KEPT: QUIET, REMOVED: "var(--c3)"}
        chart = view(
            {
                "mark": {"type": "rule", "strokeWidth": 1.5},
                "encoding": {
                    "y": number("importance", title, log=log),
                    "y2": {"datum": min(row["importance"] for row in rows) if log else 0},
                    "color": colours(list(states), "state", chosen=states),
                },
            },
            {
                "mark": {"type": "circle", "size": 70, "opacity": 1},
                "encoding": {
                    "y": number("importance", title, log=log),
                    "color": colours(list(states), "state", chosen=states),
                    "tooltip": [
                        {"field": "layer"},
                        {"field": "importance", "format": ".4g", "type": "quantitative"},
                        {"field": "state"},
                    ],
                },
            },
            height=240,
            x={
                **number("layer", "layer", axis={"tickMinStep": 1}),
                "scale": {"zero": False, "nice": False, "padding": 12},
            },
        )
        legend = [Mark(state, of) for state, of in states.items()]
        return one_view(f"layers-{self.model}", f"Layers of what {self.model} was cut from", rows, chart, legend)

    def unit_chart(self) -> Chart:
        """Scores of the units of each axis from the best to the worst, as means over layers, with the share that was kept."""
        rows: list[Row] = []
        for axis, values in axes(self.scores).items():
            curve = values.sort(dim=1, descending=True).values
            curve = (curve / curve[:, :1].clamp_min(torch.finfo(curve.dtype).tiny)).mean(dim=0)
            count = len(curve)
            for rank in sorted({round(index * (count - 1) / (CURVE_POINTS - 1)) for index in range(CURVE_POINTS)}):
                share = 100 * (rank + 1) / count
                rows.append({"kind": "unit", "axis": axis, "share": share, "score": max(float(curve[rank]), 1e-6)})
        for axis, kept, count in self._kept():
            if kept < count:
                rows.append({"kind": "cut", "axis": axis, "share": 100 * kept / count, "text": f"{kept} of {count}"})
        names = list(axes(self.scores))
        colour_of = colours(names, "axis")
        x = number("share", "best units, % of all", zero=True)
        chart = view(
            {
                "transform": [{"filter": "datum.kind == 'unit'"}],
                "mark": {"type": "line", "strokeWidth": 2},
                "encoding": {
                    "y": number("score", "score, best = 1", log=True),
                    "color": colour_of,
                },
            },
            {
                "transform": [{"filter": "datum.kind == 'cut'"}],
                "mark": {"type": "rule", "strokeDash": [4, 4], "strokeWidth": 1.5},
                "encoding": {
                    "color": colour_of,
                    "tooltip": [{"field": "axis"}, {"field": "text", "title": "kept"}],
                },
            },
            height=240,
            x=x,
        )
        legend = [Mark(name, colour(index)) for index, name in enumerate(names)]
        return one_view(f"units-{self.model}", f"Units of what {self.model} was cut from", rows, chart, legend)

    def unit_table(self) -> list[list[str]]:
        """Axis, number of units, number kept, and the share of the total score in the upper half, as text."""
        table = []
        scores = axes(self.scores)
        for axis, kept, count in self._kept():
            values = scores[axis]
            share = top_half_share(values[values.sum(dim=1) > 0]).mean()
            table.append([axis, f"{count:,}", f"{kept:,}", f"{100 * float(share):.1f} %"])
        return table

    def _kept(self) -> Iterator[tuple[str, int, int]]:
        """Each axis with the number of units that are kept, and of all."""
        for axis, values in axes(self.scores).items():
            yield axis, int(getattr(self.winner, SIZES[axis])), values.shape[1]
