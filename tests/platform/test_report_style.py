"""The report can be read in light and in dark."""

from __future__ import annotations

import re

import pytest
from helpers.command import ROOT

STYLE = (ROOT / "dashboards" / "report" / "page.css").read_text()


def _colours(which: int) -> dict[str, str]:
    """The colours of the style sheet by name: 0 for light, 1 for dark."""
    block = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[which]
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))


def _luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("which", [0, 1], ids=["light", "dark"])
def test_texts_and_marks_of_the_report_have_enough_contrast(which):
    colours = _colours(which)
    for ground in ("paper", "card"):
        for name in {"ink", "quiet", "link", *(f"c{number}" for number in range(1, 9))}:
            lighter, darker = sorted((_luminance(colours[name]), _luminance(colours[ground])), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (name, ground)
