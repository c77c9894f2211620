"""Two evaluations of the same documents."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from minitron.evaluation.scores import DocumentResult, Evaluated
from minitron.evaluation.uncertainty import standard_error

CONFIDENCE = 0.95


def paired_differences(first: Evaluated, second: Evaluated) -> tuple[list[float], list[str]]:
    """A number for each document that both have, whose mean is the difference of the second's and the first's scores on these
    documents, and the document's cluster. Both must have `values()`."""
    before, after = common_documents(first, second)
    pairs = zip(first.numbers_of(before) or (), second.numbers_of(after) or (), strict=True)
    return [b - a for a, b in pairs], [document.cluster for document in before]


def common_documents(first: Evaluated, second: Evaluated) -> tuple[list[DocumentResult], list[DocumentResult]]:
    """The results of both for the documents that both have, in the order of the second."""
    known = {(document.id, document.hash): document for document in first.documents}
    after = [document for document in second.documents if (document.id, document.hash) in known]
    return [known[document.id, document.hash] for document in after], after


@dataclass(frozen=True)
class DifferenceError:
    """Standard error of the difference of two scores that are no means of one number for each document."""

    stderr: float
    fixed: float
    """The part that more documents do not reduce: what differs between the tasks of a group, which has no others."""


def error_of_replicates(first: Evaluated, second: Evaluated) -> DifferenceError | None:
    """None without as many bootstrap replicates of the same documents; for a group by its tasks also without their scores."""
    hashes = [[document.hash for document in each.documents] for each in (first, second)]
    counts = {len(first.replicates), len(second.replicates)}
    if len(counts) > 1 or min(counts) < 2 or hashes[0] != hashes[1]:
        return None
    within = statistics.stdev(b - a for a, b in zip(first.replicates, second.replicates, strict=True))
    if not second.score.has_tasks_as_clusters:
        return DifferenceError(within, 0.0)
    if not second.task_scores or first.task_scores.keys() != second.task_scores.keys():
        return None
    tasks = [document.task for document in second.documents]
    stderr = standard_error([second.task_scores[task] - first.task_scores[task] for task in tasks], tasks)
    assert stderr is not None
    return DifferenceError(stderr, math.sqrt(max(0.0, stderr**2 - within**2)))
