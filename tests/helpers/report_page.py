"""Reads a report as a browser does."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

# Elements of the page. Whatever else appears has come out of a text.
ELEMENTS = frozenset(
    re.findall(
        r"\w+",
        "html head meta title style body header main nav section h1 h2 h3 p b a div figure label select option ul li svg "
        "circle table caption thead tbody tr th td dl dt dd small span details summary pre blockquote code script",
    )
)


class ReportPage(HTMLParser):
    """The elements, scripts and charts of a report."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.addresses: list[str] = []
        self.code: list[str] = []
        self.charts: dict[str, dict] = {}
        self.policy = ""
        self._script: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.elements.add(tag)
        assert not [name for name in values if name.startswith("on")], values
        self.addresses += [values[name] for name in ("src", "href") if name in values]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        if tag == "script":
            self._script = values

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is None:
            return
        if self._script.get("type") == "application/json":
            self.charts[self._script["id"]] = json.loads(data)
        else:
            self.code.append(data)

    def allowed_code(self) -> list[str]:
        """The scripts whose hash the policy of the page names."""
        hashes = re.findall(r"'sha256-([^']+)'", self.policy)
        return [c for c in self.code if base64.b64encode(hashlib.sha256(c.encode()).digest()).decode() in hashes]


def drawn(chart: dict, view: str) -> int:
    """Number of points, bars, lines and rules that Vega draws for a view of a chart."""
    import vl_convert

    specification = {**chart["views"][view], "data": {"values": chart["rows"]}, "width": 600}
    scene = vl_convert.vegalite_to_scenegraph(specification)
    return _marks(scene["scenegraph"])


def _marks(item) -> int:
    if isinstance(item, list):
        return sum(map(_marks, item))
    if not isinstance(item, dict):
        return 0
    if item.get("role") == "mark":
        return len(item.get("items", ()))
    return sum(_marks(inner) for inner in item.values() if isinstance(inner, dict | list))
