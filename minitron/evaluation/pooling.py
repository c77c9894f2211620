"""The score of a group of tasks, from the results of its tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from minitron.errors import InputError
from minitron.evaluation.estimates import group_replicates, replicates
from minitron.evaluation.scores import DocumentResult, Evaluated, MetricValue, renamed, worst_first
from minitron.evaluation.scoring import spread, stderr_of
from minitron.evaluation.uncertainty import standard_error


def pooled(task: str, members: Mapping[str, Evaluated], samples: int, *, by_size: bool = True) -> Evaluated:
    """The result of a group of tasks: the mean over all their documents, or with `by_size` false over the tasks.

    members: the results of the tasks by name. samples: number of samples to keep. The documents of one task belong together
    (the subjects of MMLU), unless the mean is over the tasks or there is only one. Raises InputError for tasks with different
    metrics.
    """
    by_size = by_size and len(members) > 1
    scores = {name: member.score for name, member in members.items()}
    first = next(iter(members.values()))
    main = first.score.metric, first.filter
    if other_metrics := {score.metric for score in scores.values()} - {first.score.metric}:
        raise InputError(
            f"task {task!r}: its tasks have different metrics ({first.score.metric}, {', '.join(sorted(other_metrics))})",
            "name its tasks one by one",
        )
    sizes = {name: score.num_documents if by_size else 1 for name, score in scores.items()}
    documents = tuple(
        renamed(document, name, cluster=name if by_size else None)
        for name, member in members.items()
        for document in member.documents
    )
    of_tasks = [{(each.metric, each.filter): each for each in member.metrics} for member in members.values()]
    metrics = {
        key: _pooled_metric([metrics[key] for metrics in of_tasks], sizes, documents, by_size=by_size)
        for key in of_tasks[0]
        if all(key in metrics for metrics in of_tasks)
    }
    score = replace(
        first.score,
        task=task,
        value=_mean((score.value for score in scores.values()), sizes),
        stderr=metrics[main].stderr if main in metrics else None,
        num_documents=sum(score.num_documents for score in scores.values()),
        num_available=sum(score.num_available or score.num_documents for score in scores.values()),
        num_clusters=len(members) if by_size else None,
        num_tasks=len(members),
    )
    kept = [replace(sample, id=f"{name}/{sample.id}") for name, member in members.items() for sample in member.samples]
    result = Evaluated(
        score,
        first.filter,
        tuple(metrics.values()),
        documents,
        worst_first(kept, samples, higher_is_better=score.higher_is_better),
        task_scores={name: score.value for name, score in scores.items()},
    )
    if result.values() is not None:
        return result
    weights = {name: size / sum(sizes.values()) for name, size in sizes.items()}
    drawn = group_replicates({name: _replicates(member) for name, member in members.items()}, weights)
    return replace(_with_error_of_draws(result, spread(drawn), by_size=by_size), replicates=drawn)


def _mean(values: Iterable[float], sizes: Mapping[str, int]) -> float:
    """The mean of a value of each task, weighted by size."""
    return sum(value * size for value, size in zip(values, sizes.values(), strict=True)) / sum(sizes.values())


def _pooled_metric(
    of_tasks: Sequence[MetricValue], sizes: Mapping[str, int], documents: Sequence[DocumentResult], *, by_size: bool
) -> MetricValue:
    """The mean of a metric over the tasks with these `sizes`, with its standard error. documents: of all tasks."""
    metric, name = of_tasks[0].metric, of_tasks[0].filter
    value = _mean((each.value for each in of_tasks), sizes)
    if by_size:
        error = stderr_of(metric, f"{metric},{name}", value, documents)
        if error is None:  # the score is no mean over documents, but still one of the tasks' scores
            of_task = dict(zip(sizes, (each.value for each in of_tasks), strict=True))
            tasks = [document.task for document in documents]
            error = standard_error([of_task[task] for task in tasks], tasks) or None  # zero would be chance
    else:
        known = [each.stderr for each in of_tasks if each.stderr is not None]
        error = math.sqrt(sum(one**2 for one in known)) / len(of_tasks) if len(known) == len(of_tasks) else None
    return MetricValue(metric, name, value, error, of_tasks[0].higher_is_better)


def _replicates(member: Evaluated) -> tuple[float, ...]:
    """The replicates of a task, also of one whose score happens to be a mean over documents."""
    values = member.values()
    if values is None:
        return member.replicates
    return replicates(statistics.fmean, values, [document.cluster for document in member.documents])


def _with_error_of_draws(result: Evaluated, within: float | None, *, by_size: bool) -> Evaluated:
    """The result of a group whose score is no mean over documents. within: the spread of the score over documents that are
    drawn within each task."""
    score = result.score
    if not by_size:
        return result if score.stderr is not None else replace(result, score=replace(score, stderr=within))
    if score.stderr is None or within is None or within <= score.stderr:
        return result
    # a few tasks may lie close together by chance; the error of drawing documents is in that of drawing tasks
    main = score.metric, result.filter
    metrics = (replace(each, stderr=within) if (each.metric, each.filter) == main else each for each in result.metrics)
    return replace(result, score=replace(score, stderr=within), metrics=tuple(metrics))
