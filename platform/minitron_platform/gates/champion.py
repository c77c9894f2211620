"""Gate: the version is not worse than the one that the alias points at now, beyond the uncertainty of the difference."""

from __future__ import annotations

from typing import Any

from minitron_platform.gates.gate import NO_FIGURES, Status, Subject, Verdict
from minitron_platform.gates.not_worse import Field, heldout_verdicts, task_verdicts
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
        status: Status = "unknown" if theirs is None else "failed"
        return [Verdict(f"quality {title}", status, NO_FIGURES)]
    documents = [subject.documents(each.student.documents) for each in (mine, theirs)]
    verdicts = []
    if not _same_rows(subject.version, subject.champion, mine, theirs):
        verdicts.append(Verdict(f"KL and loss {title}", "unknown", "measured on other rows or with another teacher"))
    else:
        # an aligned model departs from the teacher on purpose
        fields: tuple[Field, ...] = ("loss",) if kind_of(subject.version) == "aligned" else ("kl", "loss")
        allowed = subject.settings.tolerance
        verdicts += heldout_verdicts(title, mine.student, theirs.student, documents, fields, allowed)
    return [*verdicts, *task_verdicts(title, mine.student, theirs.student, documents)]


def _same_rows(version: Any, other: Any, mine: VersionFigures, theirs: VersionFigures) -> bool:
    if mine.heldout is not None and theirs.heldout is not None:
        return mine.heldout == theirs.heldout
    tags = [[each.tags.get(tag) for tag in ROWS_TAGS] for each in (version, other)]
    return tags[0] == tags[1] and tags[0][0] is not None
