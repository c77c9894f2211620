"""Charts of the report: data and Vega-Lite specifications, of which the page draws the one that its reader chooses.

Texts are only ever values of the data, or titles; the names of fields are ours, because Vega reads a dot or bracket in a
field's name as a path. Colours are CSS variables of the page, so that one drawing serves light, dark and printed pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minitron.text import printable

PALETTE = 8  # colours --c1 ... of the page's style sheet
INK, QUIET, GRID = "var(--ink)", "var(--quiet)", "var(--grid)"
FONT = "system-ui, sans-serif"
Row = dict[str, Any]
Spec = dict[str, Any]


@dataclass(frozen=True)
class Mark:
    """An entry of a chart's legend."""

    text: str
    colour: str
    hollow: bool = False
    """Drawn as an outline."""


@dataclass(frozen=True)
class Chart:
    """A chart with switches.

    views: Vega-Lite specifications without data, by the chosen options, one of each of `switches` in their order.
    """

    name: str
    """Its id in the page."""
    title: str
    rows: list[Row]
    views: Mapping[tuple[str, ...], Spec]
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Options by the title of the switch."""
    legend: tuple[Mark, ...] = ()

    def json(self) -> dict[str, Any]:
        """What the page's script reads: texts without control characters, and null for what is not a number."""
        views = {" / ".join(options): view for options, view in self.views.items()}
        rows = [{name: _value(value) for name, value in row.items()} for row in self.rows]
        return {"rows": rows, "views": {name: _texts(view) for name, view in views.items()}}

    def spec(self, *options: str) -> Spec:
        """A complete Vega-Lite specification: by default of the first options."""
        content = self.json()
        chosen = " / ".join(options) if options else next(iter(content["views"]))
        view: Spec = content["views"][chosen]
        return {**view, "data": {"values": content["rows"]}}


def one_view(name: str, title: str, rows: list[Row], view: Spec, legend: Sequence[Mark] = ()) -> Chart:
    """A chart without switches."""
    return Chart(name, title, rows, {(): view}, legend=tuple(legend))


def colour(index: int) -> str:
    """A colour of the palette, in a circle."""
    return f"var(--c{index % PALETTE + 1})"


def colours(names: Sequence[str], by: str = "name", *, chosen: Mapping[str, str] | None = None) -> Spec:
    """The encoding of a colour for each of `names`, which are values of the field `by`."""
    values = [(chosen or {}).get(name) or colour(index) for index, name in enumerate(names)]
    return {"field": by, "type": "nominal", "scale": {"domain": list(names), "range": values}, "legend": None}


def number(by: str, title: str, *, zero: bool = False, log: bool = False, **options: Any) -> Spec:
    """The encoding of a quantitative axis."""
    scale: Spec = {"type": "log"} if log else {"zero": zero, "padding": 12}
    axis = {"tickCount": 4, "format": "~g", "grid": False} if log else {"tickCount": 5}
    return {"field": by, "type": "quantitative", "title": title, "scale": scale, "axis": axis, **options}


TOKENS: Spec = {"tickCount": 5, "labelExpr": "format(datum.value, '~s')"}
"""An axis of tokens: 20k, 4M, 100G."""


def view(*layers: Spec, height: int = 300, **encoding: Any) -> Spec:
    """A Vega-Lite specification as wide as its container. encoding: what all layers share."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "encoding": encoding,
        "layer": list(layers),
        "config": CONFIG,
    }


CONFIG: Spec = {
    "background": None,
    "font": FONT,
    "padding": {"left": 2, "right": 6, "top": 6, "bottom": 2},
    "view": {"stroke": None},
    "axis": {
        "labelColor": QUIET,
        "titleColor": QUIET,
        "titleFontWeight": "normal",
        "titleFontSize": 12,
        "labelFontSize": 12,
        "gridColor": GRID,
        "domainColor": GRID,
        "tickColor": GRID,
        "titlePadding": 8,
        "labelOverlap": True,
        "labelSeparation": 6,
    },
    "axisX": {"tickCount": 5, "grid": False},
    "axisY": {"tickCount": 5, "domain": False, "ticks": False},
    "text": {"color": INK, "fontSize": 12},
    "header": {"labelColor": INK, "titleColor": QUIET},
}


def _value(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _texts(value: Any) -> Any:
    """A specification with `printable` applied to every string."""
    if isinstance(value, dict):
        return {name: _texts(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_texts(inner) for inner in value]
    return _value(value)
