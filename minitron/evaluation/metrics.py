"""What is known about a metric, as data: its unit, how it is written with its standard error, and which way is better.

Every table, label and caption that shows a metric takes these from here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

PLUS_MINUS = "±"


@dataclass(frozen=True)
class Metric:
    """`unit` is what it is shown in, empty where it is a number in a scale of its own, such as a perplexity or BLEU. A
    stored value times `scale` is in that unit. `digits` after the point; None for four significant ones.
    `higher_is_better` is None where nobody says."""

    name: str
    unit: str = ""
    scale: float = 1.0
    digits: int | None = None
    higher_is_better: bool | None = None

    @property
    def title(self) -> str:
        """Name and unit, for the head of a column or the start of a row."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def text(self, value: float, stderr: float | None = None) -> str:
        """A value in the metric's unit, without its name, with its standard error where that is known."""
        digits = self._digits(value) if self.digits is None else self.digits
        shown = f"{self.scale * value:,.{digits}f}"
        if stderr is None or math.isnan(stderr):
            return shown
        return f"{shown} {PLUS_MINUS} {self.scale * stderr:,.{digits}f}"

    def sentence(self, value: float, stderr: float | None = None) -> str:
        """As `text`, with the metric's name and unit, for where there is no head of a column."""
        return f"{self.name} {self.text(value, stderr)} {self.unit}".rstrip()

    def _digits(self, value: float) -> int:
        size = abs(self.scale * value)
        return 3 if not math.isfinite(size) or size < 1 else max(0, 3 - math.floor(math.log10(size)))


LOSS = Metric("held-out loss", "nats per token", digits=3, higher_is_better=False)
KL = Metric("KL to the teacher", "nats per token", digits=3, higher_is_better=False)
AGREEMENT = Metric("same first token", "%", 100, 1, True)
SPEED = Metric("speed", "tokens per second", digits=0, higher_is_better=True)

# lm-eval's metrics that are shares of 1; many definitions add their own, whose names end or begin in these ways.
_SHARES = {"acc", "f1", "em", "exact_match", "exact", "precision", "recall", "contains", "math_verify", "likelihood"}
_SHARE = re.compile(r"^acc_|(_|^)(acc|accuracy|exact_match|f1|em|match)$|_rate$|^pass@|^pass_at_")
# Tasks that give F1 and exact match out of 100 themselves (lm_eval/tasks/squadv2 and scrolls).
_OUT_OF_100 = ("squadv2", "scrolls_")
_OWN_SCALE = {
    "bits_per_byte": Metric("bits_per_byte", "bits", higher_is_better=False),
    **{
        name: Metric(name, higher_is_better=False)
        for name in ("perplexity", "word_perplexity", "byte_perplexity", "brier_score", "ter")
    },
    **{name: Metric(name, higher_is_better=True) for name in ("bleu", "chrf", "chrf++", "mcc")},
}


def task_metric(task: str, metric: str) -> Metric:
    """What is known of lm-eval's `metric` of `task`; one that is not known is shown as lm-eval gives it, without a unit."""
    if metric in _OWN_SCALE:
        return _OWN_SCALE[metric]
    if metric in _SHARES or _SHARE.search(metric):
        scale = 1 if task.startswith(_OUT_OF_100) else 100
        return Metric(metric, "%", scale, 1, True)
    return Metric(metric)
