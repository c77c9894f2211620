"""What other tools have made of a run's students: aligned and quantised versions of the registry, beside their parents."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from minitron import storage
from minitron.errors import MinitronError, StorageError
from minitron.evaluation.metrics import KL, LOSS, error_note
from minitron_platform.report.final_table import measured_on, task_title
from minitron_platform.stages.register import Register
from minitron_platform.stages.state import RunState
from minitron_platform.tracking.client import all_versions, open_registry
from minitron_platform.tracking.flusher import sqlite_path
from minitron_platform.tracking.lineage import lineage, title
from minitron_platform.tracking.version_figures import VersionFigures, figures_of
from minitron_platform.tracking.version_weights import location

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Version:
    """A student with variants, or a variant: a registered version that another tool has made from one of these."""

    title: str
    """Its name and version."""
    kind: str
    """What was done to its parent; empty for a student."""
    parent: str
    """Title of the version that it was made from; empty for a student."""
    figures: VersionFigures | None
    """None for one that was registered unmeasured."""
    weights_bytes: int | None
    """Size of its files; None if they are not in the storage."""

    @property
    def made_from(self) -> str:
        """What was done to which version; empty for a student."""
        return f"{self.kind} from {self.parent}" if self.kind else ""


def versions_with_variants(state: RunState) -> tuple[Version, ...]:
    """The registered students of a run that have variants, each followed by these, which come after their parents.

    A registry that does not answer is a warning, and there are none.
    """
    uri = state.locations.tracking_uri
    database = sqlite_path(uri)
    if database is not None and not database.exists():
        return ()
    try:
        with open_registry(uri) as client:
            every = all_versions(client)
    except MinitronError as error:
        log.warning("the report is without variants of the students: %s", error.problem)
        return ()
    by_title = {title(version): version for version in every}
    found: list[Version] = []
    for member in state.recipe.family:
        student = by_title.get(state.output(Register, member).title)
        variants = [] if student is None else list(_variants(student, every, state.locations.storage))
        if variants:
            found += [_version(student, "", "", state.locations.storage), *variants]
    return tuple(found)


def _variants(student: Any, every: Sequence[Any], root: str) -> Iterator[Version]:
    by_title = {title(version): version for version in every}
    parents = [title(student)]  # by generation
    for descendant in lineage(student, every).descendants:
        del parents[descendant.generation :]
        # students that were cut from this one have sections of their own, and so have their variants
        if descendant.kind is not None and len(parents) == descendant.generation:
            yield _version(by_title[descendant.title], descendant.kind, parents[-1], root)
            parents.append(descendant.title)


def _version(version: Any, kind: str, parent: str, root: str) -> Version:
    try:
        files = storage.manifest(location(version, root))["files"]
        size = sum(int(file["bytes"]) for file in files.values())
    except StorageError:  # they were uploaded to MLflow, or deleted
        size = None
    return Version(title(version), kind, parent, figures_of(version), size)


def variant_table(versions: Sequence[Version]) -> tuple[list[str], list[list[str]], str]:
    """Header, rows and caption of the table of students and their variants."""
    measured = [version.figures.student for version in versions if version.figures is not None]
    metrics = {task: score.metric for each in measured for task, score in each.tasks.items()}
    tasks = [task_title(task, metric) for task, metric in metrics.items()]
    scores = [(task, score) for each in measured for task, score in each.tasks.items()]
    note = error_note(score.stderr for _, score in scores)
    on = dict.fromkeys(f"{task}: {measured_on(score)}" for task, score in scores)
    caption = " · ".join(["quantised weights are measured dequantised", *on, *([note] if note else [])])
    rows = [
        [
            version.title,
            "" if version.weights_bytes is None else f"{version.weights_bytes / 1e6:,.1f}",
            *_cells(version.figures, list(metrics)),
            version.made_from,
        ]
        for version in versions
    ]
    return ["version", "weights,\nMB", KL.name, LOSS.name, *tasks, "made from"], rows, caption


def _cells(figures: VersionFigures | None, tasks: Sequence[str]) -> Iterator[str]:
    """KL, loss and scores as text."""
    own = None if figures is None else figures.student
    if own is None:
        yield "not measured"
        yield from [""] * (1 + len(tasks))
        return
    yield "" if own.kl is None else KL.text(own.kl)
    yield LOSS.text(own.loss)
    for task in tasks:
        score = own.tasks.get(task)
        failed = "failed" if task in own.failures else ""
        yield failed if score is None else score.text
