"""Gate: an aligned or quantised variant is not much worse than the version that it was made from."""

from __future__ import annotations

from minitron_platform.gates.gate import Subject, Verdict
from minitron_platform.gates.not_worse import Field, heldout_verdicts, task_verdicts
from minitron_platform.tracking.variant_tags import kind_of

TITLE = "against its parent"


def parent(subject: Subject) -> list[Verdict]:
    """An aligned model departs from the teacher on purpose, so that its KL to the teacher is not judged."""
    kind = kind_of(subject.version)
    if kind is None:
        return []
    figures = subject.figures
    if figures is None or figures.parent is None:
        return [Verdict(f"quality {TITLE}", "failed", "not measured: add it again without --unmeasured", "measured")]
    mine, theirs = figures.student, figures.parent
    documents = [subject.documents(each.documents) for each in (mine, theirs)]
    fields: tuple[Field, ...] = ("loss", "kl") if kind == "quantised" else ("loss",)
    allowed = subject.settings.variant_tolerance
    return [
        *heldout_verdicts(TITLE, mine, theirs, documents, fields, allowed),
        *task_verdicts(TITLE, mine, theirs, documents),
    ]
