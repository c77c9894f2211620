"""Gate: the distillation has not made the student worse than it was when it was pruned."""

from __future__ import annotations

from minitron_platform.gates.gate import Subject, Verdict
from minitron_platform.gates.not_worse import heldout_verdicts
from minitron_platform.tracking.variant_tags import kind_of


def distillation(subject: Subject) -> list[Verdict]:
    """It needs no limit and no champion, so that a first version with a broken training is refused too."""
    figures = subject.figures
    if figures is None or figures.pruned is None or kind_of(subject.version) is not None:
        return []
    mine, before = figures.student, figures.pruned
    documents = [subject.documents(each.documents) for each in (mine, before)]
    return list(heldout_verdicts("against the pruned model", mine, before, documents, ("kl", "loss")))
