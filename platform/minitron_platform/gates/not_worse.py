"""Verdicts on figures that may not be worse than those of another model, beyond the uncertainty of the difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from minitron.evaluation.metrics import KL, LOSS
from minitron_platform.gates.documents import Documents
from minitron_platform.gates.gate import Verdict
from minitron_platform.gates.paired import Worse, worse_rows, worse_task
from minitron_platform.tracking.version_figures import Measured

Field = Literal["kl", "loss"]
METRICS = {"kl": KL, "loss": LOSS}
BEYOND = "not worse beyond the interval"


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
        mean, other = getattr(mine, field), getattr(theirs, field)
        if mean is not None and other is not None:
            metric = METRICS[field]
            limit = BEYOND if allowed is None else f"at most {metric.text(allowed)} worse"
            worse = worse_rows(field, mean, other, *documents)
            yield _verdict(f"{metric.name} {title}", worse, allowed or 0.0, worse.text(metric), limit)


def task_verdicts(
    title: str, mine: Measured, theirs: Measured, documents: Sequence[Documents | None]
) -> Iterator[Verdict]:
    """On the benchmarks that both have. documents: of both models."""
    for task, score in mine.tasks.items():
        if task not in theirs.tasks:
            continue
        worse = worse_task(task, score, theirs.tasks[task], *documents)
        if worse is None:
            yield Verdict(f"{task} {title}", "unknown", "scored on other documents or in another way")
        else:
            yield _verdict(f"{task} {title}", worse, 0.0, worse.text(score.shown_as), BEYOND)


def _verdict(gate: str, worse: Worse, allowed: float, measured: str, limit: str) -> Verdict:
    return Verdict(gate, "failed" if worse.at_least > allowed else "passed", measured, limit)
