"""Two evaluations of the same documents."""

from __future__ import annotations

import statistics

from minitron.evaluation.scores import DocumentResult, Evaluated, contributions_of

CONFIDENCE = 0.95


def paired_differences(first: Evaluated, second: Evaluated) -> tuple[list[float], list[str]]:
    """A number for each document that both have, whose mean is the difference of the second's and the first's scores on these
    documents, and the document's cluster. Both must have `values()`."""
    before, after = common_documents(first, second)
    one, other = (
        contributions_of(result.score.metric, result.main, documents, by_task=result.score.is_mean_over_tasks)
        for result, documents in ((first, before), (second, after))
    )
    pairs = zip(one or (), other or (), strict=True)
    return [b - a for a, b in pairs], [document.cluster for document in before]


def common_documents(first: Evaluated, second: Evaluated) -> tuple[list[DocumentResult], list[DocumentResult]]:
    """The results of both for the documents that both have, in the order of the second."""
    known = {(document.id, document.hash): document for document in first.documents}
    after = [document for document in second.documents if (document.id, document.hash) in known]
    return [known[document.id, document.hash] for document in after], after


def error_of_replicates(first: Evaluated, second: Evaluated) -> float | None:
    """Standard error of the difference of two scores that are no means over documents; None without bootstrap replicates of the
    same documents."""
    hashes = [[document.hash for document in each.documents] for each in (first, second)]
    if not (first.replicates and second.replicates) or hashes[0] != hashes[1]:
        return None
    return statistics.stdev(b - a for a, b in zip(first.replicates, second.replicates, strict=True))
