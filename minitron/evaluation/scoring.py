"""From lm-eval's results of a task to a score with a standard error, all other metrics, and the result of each document."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minitron.evaluation.benchmarks import FILTER, METRIC
from minitron.evaluation.estimates import is_mean_of, replicates
from minitron.evaluation.metrics import task_metric
from minitron.evaluation.samples import log_likelihood, number_of, shown_sample
from minitron.evaluation.scores import (
    DocumentResult,
    Evaluated,
    MetricValue,
    Score,
    contributions_of,
    worst_first,
)
from minitron.evaluation.uncertainty import passage_of, score_error
from minitron.storage import fingerprint


def evaluated(
    task: str,
    part: str,
    built: Any,
    results: Mapping[str, Any],
    *,
    split: str,
    num_fewshot: int,
    samples: int,
    examples: str | None = None,
) -> Evaluated:
    """The result of a task.

    part: name of lm-eval's definition `built`, whose results are in `results`. split: whose documents were scored. samples:
    number of samples to keep. examples: split of the few-shot examples.
    """
    values_of_part = results["results"][part]
    keys = [key for key in values_of_part if "," in key and not key.split(",", 1)[0].endswith("_stderr")]
    names = [name for name in built.aggregation() if any(key.startswith(f"{name},") for key in keys)]
    metric = METRIC[task] if METRIC.get(task) in names else names[0]
    filters = [key.split(",", 1)[1] for key in keys if key.startswith(f"{metric},")]
    chosen = FILTER[task] if FILTER.get(task) in filters else filters[0]
    documents = _documents(results["samples"][part])
    metrics = [_value(built, key, float(values_of_part[key]), documents) for key in keys if key.split(",")[0] in names]
    main = next(each for each in metrics if (each.metric, each.filter) == (metric, chosen))
    drawn: tuple[float, ...] = ()
    if _contributions(metric, f"{metric},{chosen}", main.value, documents) is None:
        drawn = _replicates(built, metric, chosen, results["samples"][part], documents)
    if drawn:
        metrics[metrics.index(main)] = main = replace(main, stderr=spread(drawn))
    higher_is_better = main.higher_is_better
    if higher_is_better is None:
        higher_is_better = task_metric(part, metric).higher_is_better
    clusters = len({document.cluster for document in documents})
    score = Score(
        task=part,
        metric=metric,
        value=main.value,
        stderr=main.stderr,
        num_documents=len(documents),
        num_fewshot=num_fewshot,
        version=str(results["versions"][part]),
        split=split,
        higher_is_better=higher_is_better,
        num_available=len(built.task_docs),
        num_clusters=clusters if clusters < len(documents) else None,
        examples=examples,
    )
    kept = [
        shown_sample(built, sample, metric)
        for sample in results["samples"][part]
        if samples and sample["filter"] == chosen
    ]
    worst = worst_first([sample for sample in kept if sample], samples, higher_is_better=higher_is_better)
    return Evaluated(score, chosen, tuple(metrics), documents, worst, drawn)


def _documents(samples: Sequence[Mapping[str, Any]]) -> tuple[DocumentResult, ...]:
    """lm-eval has one sample for each document and filter."""
    values: dict[int, dict[str, float]] = {}
    weights: dict[int, dict[str, float]] = defaultdict(dict)
    firsts: dict[int, Mapping[str, Any]] = {}
    for sample in samples:
        number = int(sample["doc_id"])
        firsts.setdefault(number, sample)
        own = values.setdefault(number, {})
        for metric in sample["metrics"]:
            key = f"{metric},{sample['filter']}"
            if (value := number_of(sample[metric])) is not None:
                own[key] = value
            elif (pair := log_likelihood(metric, sample[metric])) is not None:
                own[key], weights[number][key] = pair
    return tuple(
        DocumentResult(
            id=str(number),
            hash=str(first["doc_hash"]),
            cluster=_cluster(first["doc"]) or str(number),
            values=values[number],
            prompt=str(first["prompt_hash"])[:16],
            weights=weights[number],
        )
        for number, first in sorted(firsts.items())
    )


def _cluster(document: Mapping[str, Any]) -> str:
    """Equal for documents with the same passage; empty without one."""
    passage = passage_of(document)
    return "" if passage is None else fingerprint(passage)


def _value(built: Any, key: str, value: float, documents: Sequence[DocumentResult]) -> MetricValue:
    metric, name = key.split(",", 1)
    return MetricValue(
        metric=metric,
        filter=name,
        value=value,
        stderr=stderr_of(metric, key, value, documents),
        higher_is_better=built.higher_is_better()[metric],
    )


def stderr_of(metric: str, key: str, value: float, documents: Sequence[DocumentResult]) -> float | None:
    """Standard error of the `value` of a metric, which documents have under `key`. None if it is not the mean of one number for
    each document."""
    numbers = _contributions(metric, key, value, documents)
    return None if numbers is None else score_error(numbers, [each.cluster for each in documents])


def _contributions(metric: str, key: str, value: float, documents: Sequence[DocumentResult]) -> list[float] | None:
    """Numbers of the documents of a task whose mean is `value`; None if there are none."""
    numbers = contributions_of(metric, key, documents, grouped=False)
    return numbers if numbers is not None and is_mean_of(numbers, value) else None


def _replicates(
    built: Any, metric: str, name: str, samples: Sequence[Mapping[str, Any]], documents: Sequence[DocumentResult]
) -> tuple[float, ...]:
    """Replicates of a metric that is not a mean over documents, such as F1 or BLEU. name: that of lm-eval's filter."""
    items = {
        str(each["doc_id"]): each[metric] for each in samples if each["filter"] == name and metric in each["metrics"]
    }
    having = [document for document in documents if document.id in items]
    clusters = [document.cluster for document in having]
    return replicates(built.aggregation()[metric], [items[document.id] for document in having], clusters)


def spread(replicates: Sequence[float]) -> float | None:
    """Standard deviation of replicates. None if all are equal, for example because every answer is wrong: more documents might
    have other answers."""
    return statistics.stdev(replicates) or None if replicates else None
