"""Gate: an aligned or quantised variant is not much worse than the version that it was made from."""

from __future__ import annotations

from minitron.evaluation.metrics import KL, LOSS
from minitron_platform.gates.gate import Status, Subject, Verdict
from minitron_platform.gates.paired import worse_rows, worse_task
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
    allowed = subject.settings.variant_tolerance
    verdicts = []
    for name, metric in (("loss", LOSS), *([("kl", KL)] if kind == "quantised" else [])):
        mean, other = getattr(mine, name), getattr(theirs, name)
        if mean is not None and other is not None:
            worse = worse_rows(name, mean, other, *documents)
            status: Status = "failed" if worse.at_least > allowed else "passed"
            limit = f"at most {metric.text(allowed)} worse"
            verdicts.append(Verdict(f"{metric.name} {TITLE}", status, worse.text(metric), limit))
    for task, score in mine.tasks.items():
        if task in theirs.tasks:
            found = worse_task(task, score, theirs.tasks[task], *documents)
            if found is None:
                verdicts.append(Verdict(f"{task} {TITLE}", "unknown", "scored on other documents or in another way"))
            else:
                status = "failed" if found.at_least > 0 else "passed"
                text = found.text(score.shown_as)
                verdicts.append(Verdict(f"{task} {TITLE}", status, text, "not worse beyond the interval"))
    return verdicts
