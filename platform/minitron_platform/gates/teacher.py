"""Gates: quality in relation to the teacher, and no failed benchmark."""

from __future__ import annotations

import math

from minitron.evaluation.metrics import KL, LOSS
from minitron_platform.gates.gate import NO_FIGURES, NOT_MEASURED, Status, Subject, Verdict, at_most
from minitron_platform.gates.not_worse import OTHERWISE
from minitron_platform.gates.paired import worse_rows, worse_task
from minitron_platform.tracking.variant_tags import kind_of
from minitron_platform.tracking.version_figures import Measured, VersionFigures

TITLE = "against the teacher"


def teacher(subject: Subject) -> list[Verdict]:
    figures, settings = subject.figures, subject.settings
    variant = kind_of(subject.version) is not None
    if figures is None:
        limits = [settings.max_kl, settings.max_loss_increase, settings.max_task_loss]
        status: Status = "unknown" if limits == [None] * len(limits) else "failed"
        return [] if variant else [Verdict("quality", status, NO_FIGURES)]
    student = figures.student
    verdicts = [Verdict(task, "failed", f"failed: {why}"[:300], "scored") for task, why in student.failures.items()]
    if variant:  # is judged against its parent
        return verdicts
    if settings.max_kl is not None:
        verdicts.append(at_most(KL.name, student.kl, settings.max_kl, KL.text))
    return verdicts + _loss(subject, figures) + _tasks(subject, figures)


def _loss(subject: Subject, figures: VersionFigures) -> list[Verdict]:
    limit = subject.settings.max_loss_increase
    if limit is None:
        return []
    gate, allowed = f"loss {TITLE}", f"at most {LOSS.text(limit)} worse"
    if figures.teacher is None:
        return [Verdict(gate, "failed", f"the teacher: {NOT_MEASURED}", allowed)]
    mine, other = (subject.documents(each.documents) for each in (figures.student, figures.teacher))
    worse = worse_rows("loss", figures.student.loss, figures.teacher.loss, mine, other)
    return [Verdict(gate, "passed" if worse.value <= limit else "failed", worse.text(LOSS), allowed)]


def _tasks(subject: Subject, figures: VersionFigures) -> list[Verdict]:
    """A benchmark fails if it is worse than the limit allows even at the better end of the 95 % interval."""
    limit = subject.settings.max_task_loss
    if limit is None:
        return []
    teacher = figures.teacher or Measured(loss=math.nan)
    mine, other = (subject.documents(each.documents) for each in (figures.student, teacher))
    verdicts = []
    for task, score in figures.student.tasks.items():
        gate, allowed = f"{task} {TITLE}", f"at most {score.shown_as.text(limit)} worse"
        if task not in teacher.tasks:
            verdicts.append(Verdict(gate, "failed", f"the teacher: {NOT_MEASURED}", allowed))
            continue
        worse = worse_task(task, score, teacher.tasks[task], mine, other)
        if worse is None:
            verdicts.append(Verdict(gate, "unknown", OTHERWISE))
        else:
            status: Status = "passed" if worse.at_least <= limit else "failed"
            verdicts.append(Verdict(gate, status, worse.text(score.shown_as, score.settings), allowed))
    return verdicts
