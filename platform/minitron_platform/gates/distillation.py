"""Gate: the distillation has not made the student worse than it was when it was pruned."""

from __future__ import annotations

from minitron.evaluation.metrics import KL, LOSS
from minitron_platform.gates.gate import Status, Subject, Verdict
from minitron_platform.gates.paired import worse_rows
from minitron_platform.tracking.variant_tags import kind_of

TITLE = "against the pruned model"


def distillation(subject: Subject) -> list[Verdict]:
    """It needs no limit and no champion, so that a first version with a broken training is refused too."""
    figures = subject.figures
    if figures is None or figures.pruned is None or kind_of(subject.version) is not None:
        return []
    mine, before = figures.student, figures.pruned
    documents = [subject.documents(each.documents) for each in (mine, before)]
    verdicts = []
    for name, metric in (("kl", KL), ("loss", LOSS)):
        mean, other = getattr(mine, name), getattr(before, name)
        if mean is not None and other is not None:
            worse = worse_rows(name, mean, other, *documents)
            status: Status = "failed" if worse.at_least > 0 else "passed"
            verdicts.append(
                Verdict(f"{metric.name} {TITLE}", status, worse.text(metric), "not worse beyond the interval")
            )
    return verdicts
