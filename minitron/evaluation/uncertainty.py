"""Standard errors of means over documents, of which some belong together.

Sources: Miller 2024, arXiv 2411.00640, sections 2 and 3; the factor for few clusters is Stata's and statsmodels'. Shares of 0
and 100 %: Agresti and Coull 1998, The American Statistician 52(2). Equal differences: Agresti and Min 2005, Statistics in
Medicine 24(5).
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

# Fields with a text that several documents of a benchmark may ask about (boolq, drop, race, squadv2, coqa, multirc, record).
PASSAGES = ("passage", "context", "article", "paragraph", "story")


def passage_of(document: Mapping[str, object]) -> str | None:
    """The text that a document asks about, which it may have in common with others; None if it has none."""
    texts = (document.get(field) for field in PASSAGES)
    return next((text for text in texts if isinstance(text, str) and text), None)


def score_error(values: Sequence[float], clusters: Sequence[object]) -> float | None:
    """As `standard_error`, but not zero where all values are 0, or all are 1.

    Answers that are all right do not show that every answer would be. The error is then Agresti and Coull's: that of the share
    after two right and two wrong answers have been added, with documents that belong together as one.
    """
    plain = standard_error(values, clusters)
    if plain != 0 or set(values) not in ({0.0}, {1.0}):
        return plain
    count = len(set(clusters)) + 4
    share = 2 / count
    return math.sqrt(share * (1 - share) / count)


def difference_error(differences: Sequence[float], clusters: Sequence[object]) -> float | None:
    """As `standard_error`, but not zero where two models were right or wrong alike on every document, or one of them right and
    the other wrong on every one.

    That they are alike on a few documents does not show that they are on all. The error is then Agresti and Min's: half a
    document is added to each of the four combinations of right and wrong, with documents that belong together as one.
    """
    plain = standard_error(differences, clusters)
    if plain != 0 or set(differences) not in ({0.0}, {1.0}, {-1.0}):
        return plain
    groups = len(set(clusters))
    count = groups + 2
    surplus = groups * abs(differences[0])  # documents on which one model is right and the other wrong
    return math.sqrt(1 + surplus - surplus**2 / count) / count


def standard_error(values: Sequence[float], clusters: Sequence[object]) -> float | None:
    """Standard error of the mean of `values`, of which those with equal `clusters` belong together.

    If no two do, that is their standard deviation divided by sqrt(len(values)). None if all belong together.
    """
    count = len(set(clusters))
    if count < 2:
        return None
    if count == len(values):
        return statistics.stdev(values) / math.sqrt(len(values))
    mean = math.fsum(values) / len(values)
    sums: dict[object, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    squares = math.fsum(total**2 for total in sums.values())
    return math.sqrt(squares * count / (count - 1)) / len(values)
