"""Verdicts on figures that may not be worse than those of another model, beyond the uncertainty of the difference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from minitron.evaluation.metrics import KL, LOSS
from minitron_platform.gates.documents import Documents
from minitron_platform.gates.gate import NOT_MEASURED, Verdict
from minitron_platform.gates.paired import Worse, worse_rows, worse_task
from minitron_platform.tracking.version_figures import Measured

Field = Literal["kl", "loss"]
METRICS = {"kl": KL, "loss": LOSS}
BEYOND = "not worse beyond the interval"
NO_NUMBER = "the other one's is not a number"
OTHERWISE = "scored on other documents or in another way"


def heldout_verdicts(
    title: str,
    mine: Measured,
    theirs: Measured,
    documents: Sequence[Documents | None],
    fields: Sequence[Field],
    allowed: float | None = None,
) -> Iterator[Verdict]:
    """On the held-out metrics `fields`, of which lower is better. documents: of both models. allowed: by how much a metric may
    be worse; None for not at all."""
    for field in fields:
        mean, other, metric = getattr(mine, field), getattr(theirs, field), METRICS[field]
        gate = f"{metric.name} {title}"
        limit = BEYOND if allowed is None else f"at most {metric.text(allowed)} worse"
        if other is None:
            continue
        if mean is None:
            yield Verdict(gate, "failed", NOT_MEASURED, limit)
        elif _is_nan_alone(other, mean):
            yield Verdict(gate, "unknown", NO_NUMBER)
        else:
            worse = worse_rows(field, mean, other, *documents)
            yield _verdict(gate, worse, allowed or 0.0, worse.text(metric), limit)


def task_verdicts(
    title: str, mine: Measured, theirs: Measured, documents: Sequence[Documents | None]
) -> Iterator[Verdict]:
    """On the other one's benchmarks. documents: of both models."""
    for task, other in theirs.tasks.items():
        score = mine.tasks.get(task)
        if score is None:  # one that failed has a verdict of its own
            yield Verdict(f"{task} {title}", "unknown", NOT_MEASURED)
            continue
        if _is_nan_alone(other.value, score.value):
            yield Verdict(f"{task} {title}", "unknown", NO_NUMBER)
            continue
        worse = worse_task(task, score, other, *documents)
        if worse is None:
            yield Verdict(f"{task} {title}", "unknown", OTHERWISE)
        else:
            yield _verdict(f"{task} {title}", worse, 0.0, worse.text(score.shown_as, score.settings), BEYOND)


def _is_nan_alone(other: float, mine: float) -> bool:
    """Whether the other model's figure is NaN, and this one's is not: a broken version must not keep its successor out."""
    return math.isnan(other) and not math.isnan(mine)


def _verdict(gate: str, worse: Worse, allowed: float, measured: str, limit: str) -> Verdict:
    return Verdict(gate, "passed" if worse.at_least <= allowed else "failed", measured, limit)
