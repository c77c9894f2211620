"""Gates: quality in relation to the teacher, and no failed benchmark."""

from __future__ import annotations

from minitron.evaluation.metrics import KL, LOSS
from minitron_platform.gates.gate import Status, Subject, Verdict, at_most
from minitron_platform.gates.paired import worse_rows, worse_task
from minitron_platform.tracking.variant_tags import kind_of
from minitron_platform.tracking.version_figures import VersionFigures


def teacher(subject: Subject) -> list[Verdict]:
    figures = subject.figures
    variant = kind_of(subject.version) is not None
    if figures is None:
        return [] if variant else [Verdict("quality", "unknown", "no figures are recorded")]
    student = figures.student
    verdicts = [Verdict(task, "failed", f"failed: {why}"[:300], "scored") for task, why in student.failures.items()]
    if variant:  # is judged against its parent
        return verdicts
    if subject.settings.max_kl is not None:
        if student.kl is None:
            verdicts.append(Verdict(KL.name, "unknown", "not recorded", f"at most {KL.text(subject.settings.max_kl)}"))
        else:
            verdicts.append(at_most(KL.name, student.kl, subject.settings.max_kl, KL.text))
    return verdicts + _loss(subject, figures) + _tasks(subject, figures)


def _loss(subject: Subject, figures: VersionFigures) -> list[Verdict]:
    limit = subject.settings.max_loss_increase
    if limit is None or figures.teacher is None:
        return []
    mine, other = (subject.documents(each.documents) for each in (figures.student, figures.teacher))
    worse = worse_rows("loss", figures.student.loss, figures.teacher.loss, mine, other)
    status: Status = "passed" if worse.value <= limit else "failed"
    return [Verdict("loss against the teacher", status, worse.text(LOSS), f"at most {LOSS.text(limit)} worse")]


def _tasks(subject: Subject, figures: VersionFigures) -> list[Verdict]:
    """A benchmark fails if it is worse than the limit allows even at the better end of the 95 % interval."""
    limit = subject.settings.max_task_loss
    if limit is None or figures.teacher is None:
        return []
    mine, other = (subject.documents(each.documents) for each in (figures.student, figures.teacher))
    verdicts = []
    for task, score in figures.student.tasks.items():
        if task not in figures.teacher.tasks:
            continue
        worse = worse_task(task, score, figures.teacher.tasks[task], mine, other)
        metric = score.shown_as
        if worse is not None:
            status: Status = "failed" if worse.at_least > limit else "passed"
            allowed = f"at most {metric.text(limit)} worse"
            verdicts.append(Verdict(f"{task} against the teacher", status, worse.text(metric), allowed))
    return verdicts
