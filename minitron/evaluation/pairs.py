"""Two evaluations of the same documents."""

from __future__ import annotations

from minitron.evaluation.scores import Evaluated

CONFIDENCE = 0.95


def paired_differences(first: Evaluated, second: Evaluated) -> tuple[list[float], list[str]]:
    """The second's minus the first's main metric of each document that both have, and its cluster."""
    known = {(document.id, document.hash): document for document in first.documents}
    pairs = [(known[key], other) for other in second.documents if (key := (other.id, other.hash)) in known]
    differences = [after.values[first.main] - before.values[first.main] for before, after in pairs]
    return differences, [before.cluster for before, _ in pairs]
