"""Properties of metrics: unit, number format, and whether higher is better.

Every table, label and caption that shows a metric uses these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from minitron.arguments import check_type

PLUS_MINUS = "±"
UNKNOWN_ERROR = "-"


@dataclass(frozen=True)
class Metric:
    """How to show a metric.

    unit: empty for a number without unit, such as a perplexity or BLEU. scale: factor from a stored value to the unit. digits:
    number of digits after the decimal point; None for four significant digits. higher_is_better: None if unknown.
    """

    name: str
    unit: str = ""
    scale: float = 1.0
    digits: int | None = None
    higher_is_better: bool | None = None

    @property
    def title(self) -> str:
        """Name and unit, for the heading of a column or row."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def text(self, value: float) -> str:
        """A stored value in the metric's unit, without name and unit; for a score see `with_error`."""
        return f"{self.scale * value:,.{self._digits(value)}f}"

    def with_error(self, value: float, stderr: float | None) -> str:
        """A score and its standard error in the metric's unit, without name and unit: "47.5 ± 4.6", or "47.5 ± -" where the
        error cannot be told (see `error_note`)."""
        error = UNKNOWN_ERROR
        if stderr is not None and not math.isnan(stderr):
            error = f"{self.scale * stderr:,.{self._digits(value)}f}"
        return f"{self.text(value)} {PLUS_MINUS} {error}"

    def span(self, value: float, stderr: float | None) -> tuple[float, float]:
        """A value minus and plus its standard error, in the metric's unit; of a percentage what lies between 0 and 100."""
        reach = stderr if stderr is not None and math.isfinite(stderr) else 0.0
        low, high = self.scale * (value - reach), self.scale * (value + reach)
        return (max(low, 0.0), min(high, 100.0)) if self.unit == "%" else (low, high)

    def sentence(self, text: str) -> str:
        """A value as text with the metric's name and unit."""
        return f"{self.name} {text} {self.unit}".rstrip()

    def _digits(self, value: float) -> int:
        if self.digits is not None:
            return self.digits
        size = abs(self.scale * value)
        return 3 if not math.isfinite(size) or size < 1 else max(0, 3 - math.floor(math.log10(size)))


def error_note(errors: Iterable[float | None]) -> str:
    """What ± means, for the caption of scores with these standard errors; empty without scores."""
    known = [error is not None and not math.isnan(error) for error in errors]
    if not known:
        return ""
    note = f"{PLUS_MINUS} is the standard error"
    if all(known):
        return note
    return f"{note}; {UNKNOWN_ERROR} where it cannot be told: of one document or task, and of scores that do not vary"


LOSS = Metric("held-out loss", "nats per token", digits=3, higher_is_better=False)
KL = Metric("KL to the teacher", "nats per token", digits=3, higher_is_better=False)
AGREEMENT = Metric("same first token", "%", 100, 1, True)
SPEED = Metric("speed", "tokens per second", digits=0, higher_is_better=True)

# lm-eval's metrics with values from 0 to 1; many task definitions add their own, whose names match the pattern.
_SHARES = {"acc", "f1", "em", "exact_match", "exact", "precision", "recall", "contains", "math_verify", "likelihood"}
_SHARE = re.compile(r"^acc_|(_|^)(acc|accuracy|exact_match|f1|em|match)$|_rate$|^pass@|^pass_at_")
# Tasks whose F1 and exact match are already percentages (lm_eval/tasks/squadv2 and scrolls).
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
    """Properties of lm-eval's `metric` of `task`; an unknown metric has no unit and keeps lm-eval's scale."""
    check_type("task", task, str)
    check_type("metric", metric, str)
    if task == "xlsum_en" and metric == "rougeL":
        return Metric(metric, "%", 100, 1, True)
    if metric in _OWN_SCALE:
        return _OWN_SCALE[metric]
    if metric in _SHARES or _SHARE.search(metric):
        scale = 1 if task.startswith(_OUT_OF_100) else 100
        return Metric(metric, "%", scale, 1, True)
    return Metric(metric)
