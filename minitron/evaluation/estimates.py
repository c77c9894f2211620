"""Scores as means of one number for each document, also those that are another function of the documents.

The standard error of their mean is that of the score, and the mean of two models' differences is that of their scores. Sources:
ratios, and the delta method for what is computed from them: Cochran 1977, Sampling Techniques, 3rd edition, section 6.3; means
over strata, such as the tasks of a group: the same, section 5.3. For everything else there are bootstrap replicates: Efron and
Tibshirani 1993, An Introduction to the Bootstrap, chapter 6.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

REPLICATES = 100  # lm-eval's number for metrics that take long, such as BLEU

# Score and its slope, as functions of the mean log-likelihood of a word, byte or document.
_OF_LOG_LIKELIHOOD: dict[str, Callable[[float], tuple[float, float]]] = {
    **{
        name: lambda mean: (math.exp(-mean), -math.exp(-mean))
        for name in ("perplexity", "word_perplexity", "byte_perplexity")
    },
    "bits_per_byte": lambda mean: (-mean / math.log(2), -1 / math.log(2)),
}


def contributions(
    metric: str,
    values: Sequence[float],
    weights: Sequence[float],
    tasks: Sequence[Hashable],
    *,
    by_task: bool = False,
) -> list[float] | None:
    """One number per document whose mean is the score; None if the score cannot be written as such a mean, or a value is not
    finite.

    metric: lm-eval's name. values: of each document, of a perplexity its log-likelihood in nats. weights: what a value is
    divided by, such as its number of words; 1 for a plain mean. tasks: the task of each document of a group; otherwise all
    equal. by_task: whether a group's tasks count the same, whatever their size; otherwise its documents do.
    """
    of_task: dict[Hashable, list[int]] = defaultdict(list)
    for number, task in enumerate(tasks):
        of_task[task].append(number)
    found = [0.0] * len(values)
    means: dict[Hashable, float] = {}
    for task, numbers in of_task.items():
        own = _of_one_task(metric, [values[n] for n in numbers], [weights[n] for n in numbers])
        if own is None:
            return None
        means[task] = math.fsum(own) / len(own)
        for number, value in zip(numbers, own, strict=True):
            found[number] = value
    if not by_task or len(means) < 2:
        return found
    score = math.fsum(means.values()) / len(means)
    share = len(values) / len(means)
    return [
        score + share / len(of_task[task]) * (value - means[task]) for value, task in zip(found, tasks, strict=True)
    ]


def _of_one_task(metric: str, values: Sequence[float], weights: Sequence[float]) -> list[float] | None:
    if not all(map(math.isfinite, values)):
        return None
    if metric not in _OF_LOG_LIKELIHOOD:
        return list(values) if all(weight == 1 for weight in weights) else None
    total = math.fsum(weights)
    if not total:
        return None
    mean = math.fsum(values) / total
    try:
        score, slope = _OF_LOG_LIKELIHOOD[metric](mean)
    except OverflowError:
        return None
    scale = len(values) / total
    return [score + slope * scale * (v - mean * w) for v, w in zip(values, weights, strict=True)]


def is_mean_of(numbers: Sequence[float], score: float) -> bool:
    """Whether `score` is the mean of `numbers`, but for rounding."""
    return math.isclose(math.fsum(numbers) / len(numbers), score, rel_tol=1e-6, abs_tol=1e-6)


def replicates(
    aggregate: Callable[[list[Any]], float], items: Sequence[Any], clusters: Sequence[Hashable]
) -> tuple[float, ...]:
    """Scores of documents that are drawn with replacement, those that belong together as one.

    The draws depend on nothing but the number of clusters, so that the same ones are made for every model. Empty for one
    cluster, and if the score of some drawn documents is not defined, such as an area under a curve of one class.
    """
    members: dict[Hashable, list[Any]] = defaultdict(list)
    for item, cluster in zip(items, clusters, strict=True):
        members[cluster].append(item)
    groups = list(members.values())
    if len(groups) < 2:
        return ()
    draw = random.Random(0)
    drawn = (draw.choices(groups, k=len(groups)) for _ in range(REPLICATES))
    try:
        scores = tuple(float(aggregate([item for group in each for item in group])) for each in drawn)
    except (ValueError, ArithmeticError):
        return ()
    return scores if all(map(math.isfinite, scores)) else ()


def group_replicates(own: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> tuple[float, ...]:
    """Scores of a group whose documents are drawn within each of its tasks, from the `replicates` of each task.

    own, weights: by task, the weights with a sum of 1. Empty if a task has no replicates.
    """
    if not all(own.values()):
        return ()
    drawn = []
    for name, scores in own.items():
        # Tasks of one size have the same draws, as if their documents belonged together: another order parts them.
        drawn.append([weights[name] * score for score in random.Random(name).sample(list(scores), len(scores))])
    return tuple(math.fsum(scores) for scores in zip(*drawn, strict=True))
