"""Gate: the version is not worse than the one that the alias points at now, beyond the uncertainty of the difference."""

from __future__ import annotations

from typing import Any

from minitron.evaluation.metrics import KL, LOSS
from minitron_platform.gates.gate import Subject, Verdict
from minitron_platform.gates.paired import Worse, worse_rows, worse_task
from minitron_platform.tracking import lineage
from minitron_platform.tracking.variant_tags import PARENT_TAG, kind_of
from minitron_platform.tracking.version_figures import VersionFigures, figures_of

ROWS_TAGS = ("minitron.data_sha256", "minitron.teacher_sha256", "minitron.teacher_corrected")


def champion(subject: Subject) -> list[Verdict]:
    if subject.champion is None:
        return []
    if kind_of(subject.version) is not None and subject.version.tags.get(PARENT_TAG) == lineage.title(subject.champion):
        return []  # the gate of the parent judges by the same figures
    title = f"against version {subject.champion.version}"
    mine, theirs = subject.figures, figures_of(subject.champion)
    if mine is None or theirs is None:
        return [Verdict(f"quality {title}", "unknown", "no figures are recorded")]
    documents = [subject.documents(each.student.documents) for each in (mine, theirs)]
    allowed = subject.settings.tolerance
    verdicts = []
    if not _same_rows(subject.version, subject.champion, mine, theirs):
        verdicts.append(Verdict(f"KL and loss {title}", "unknown", "measured on other rows or with another teacher"))
    else:
        aligned = kind_of(subject.version) == "aligned"  # it departs from the teacher on purpose
        for name, metric in (*([] if aligned else [("kl", KL)]), ("loss", LOSS)):
            mean, other = getattr(mine.student, name), getattr(theirs.student, name)
            if mean is not None and other is not None:
                worse = worse_rows(name, mean, other, *documents)
                limit = f"at most {metric.text(allowed)} worse"
                verdicts.append(_verdict(f"{metric.name} {title}", worse, allowed, worse.text(metric), limit))
    for task, score in mine.student.tasks.items():
        if task in theirs.student.tasks:
            found = worse_task(task, score, theirs.student.tasks[task], *documents)
            if found is None:
                verdicts.append(Verdict(f"{task} {title}", "unknown", "scored on other documents or in another way"))
            else:
                text = found.text(score.shown_as)
                verdicts.append(_verdict(f"{task} {title}", found, 0.0, text, "not worse beyond the interval"))
    return verdicts


def _verdict(name: str, worse: Worse, allowed: float, measured: str, limit: str) -> Verdict:
    return Verdict(name, "failed" if worse.at_least > allowed else "passed", measured, limit)


def _same_rows(version: Any, other: Any, mine: VersionFigures, theirs: VersionFigures) -> bool:
    if mine.heldout is not None and theirs.heldout is not None:
        return mine.heldout == theirs.heldout
    tags = [[each.tags.get(tag) for tag in ROWS_TAGS] for each in (version, other)]
    return tags[0] == tags[1] and tags[0][0] is not None
