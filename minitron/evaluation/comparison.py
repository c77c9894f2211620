"""Comparisons of models on the same documents: paired differences, which of them are real, and how many documents others take.

A difference is the mean of the documents' differences. Its standard error is that of these differences, with documents that
belong together as clusters. It is far smaller than the scores' standard errors suggest, as models are right on the same
documents. Of scores that are no mean of one number for each document it is the spread of the differences of bootstrap
replicates, and of a group of such scores that of its tasks' differences.
Sources: Miller 2024, arXiv 2411.00640, section 4; Holm 1979, Scandinavian Journal of Statistics 6.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from types import ModuleType

from minitron.errors import InputError
from minitron.evaluation.pairs import CONFIDENCE, error_of_replicates, paired_differences
from minitron.evaluation.result_file import ModelResults
from minitron.evaluation.scores import Evaluated
from minitron.evaluation.uncertainty import difference_error, standard_error

NOT_COMPARED = (
    "is no mean over documents with finite values, and the results are of an earlier version or not of the same documents, or "
    "of documents on which some draws have no score"
)
POWER = 0.8  # chance that the stated number of documents shows a difference of the size that was measured


@dataclass(frozen=True)
class Difference:
    """The score of `model` minus that of `reference` on one task, in lm-eval's scale."""

    task: str
    reference: str
    model: str
    value: float
    stderr: float | None
    """Standard error of the paired difference; None if it cannot be estimated."""
    interval: tuple[float, float] | None
    """95 % confidence, of this difference alone."""
    p_value: float | None
    """Probability of a difference as large as this if there is none."""
    adjusted: float | None
    """`p_value` corrected for the number of differences that are compared (Holm)."""
    num_documents: int
    """That both models were scored on."""
    needed: int | None
    """Documents with which a difference of this size is real with a chance of 80 %; None if it is real, zero or `unreachable`.
    """
    num_available: int | None
    """Documents of the benchmark's split."""
    fixed_stderr: float = 0.0
    """The part of `stderr` that more documents do not reduce: what differs between the tasks of a group, which has no others.
    """
    unreachable: bool = False
    """Whether no number of documents would show a difference of this size, because of `fixed_stderr`."""

    @property
    def is_real(self) -> bool:
        """Whether it is significant at 5 % after the correction."""
        return self.adjusted is not None and self.adjusted < 1 - CONFIDENCE


@dataclass(frozen=True)
class Comparison:
    """What differs between models."""

    differences: list[Difference]
    not_compared: list[str]
    """Sentences on tasks of which a model and its reference have scores, but no difference with an uncertainty."""


def compare(results: Sequence[ModelResults]) -> list[Difference]:
    """The differences of `comparison`, which raises the same errors."""
    return comparison(results).differences


def comparison(results: Sequence[ModelResults]) -> Comparison:
    """The differences of all models to the first one, on every task that both have, corrected for their number. On a task that
    the first model lacks they are those to the first one that has it.

    Raises InputError if fewer than two models are given, if they have no task in common that can be compared, or if a task was
    run with other settings or on other documents.
    """
    if len(results) < 2:
        raise InputError(f"{len(results)} model to compare", "give at least two")
    pairs = _pairs(results)
    if not pairs:
        raise InputError("the models have no task in common", "evaluate them on the same tasks")
    for each in pairs:
        _check_templates(*each)
        _check_settings(*each)
    found: list[Difference] = []
    left_out: list[str] = []
    for task, reference, model in pairs:
        difference = _difference(task, reference, model)
        if difference is not None:
            found.append(difference)
        else:
            metric = reference.tasks[task].score.metric
            left_out.append(f"{task} of {model.model} is not compared: {metric} {NOT_COMPARED}")
    if not found:
        raise InputError("; ".join(left_out), "evaluate the models again, on a task that can be compared")
    return Comparison(_corrected(found), left_out)


def _references(results: Sequence[ModelResults]) -> list[tuple[ModelResults, list[tuple[ModelResults, list[str]]]]]:
    """Each model but the first with those that it is compared with, and on which tasks: the first one that has a task."""
    found = []
    for number, model in enumerate(results[1:], start=1):
        known: set[str] = set()
        references = []
        for reference in results[:number]:
            if tasks := [task for task in reference.tasks if task in model.tasks and task not in known]:
                references.append((reference, tasks))
                known.update(tasks)
        found.append((model, references))
    return found


def _pairs(results: Sequence[ModelResults]) -> list[tuple[str, ModelResults, ModelResults]]:
    """What is compared: a task, the reference and the model."""
    return [
        (task, reference, model)
        for model, references in _references(results)
        for reference, tasks in references
        for task in tasks
    ]


def with_tasks(results: Sequence[ModelResults], tasks: Sequence[str]) -> list[ModelResults]:
    """The results with no other tasks than `tasks`. Raises InputError for one that no model has."""
    known = sorted({task for result in results for task in result.tasks})
    for task in tasks:
        if task not in known:
            raise InputError(f"task {task!r}: no model has results of it", f"use {', '.join(known)}")
    return [
        replace(each, tasks={task: result for task, result in each.tasks.items() if task in tasks}) for each in results
    ]


def setting_notes(results: Sequence[ModelResults]) -> list[str]:
    """Sentences on settings in which models differ from those that they are compared with, and which may explain a part of a
    difference."""
    notes = []
    pairs_of_models = [(other, *pair) for other, references in _references(results) for pair in references]
    for other, reference, tasks in pairs_of_models:
        templated = [task for task in tasks if _templated(other, task)]
        pairs = [(name, getattr(reference, name), getattr(other, name)) for name in ("dtype", "device", "engine")]
        pairs += [
            (f"{name} version", reference.versions.get(name, ""), other.versions.get(name, ""))
            for name in ("lm_eval", "transformers")
        ]
        different = [f"{name} {one or 'unknown'} and {two or 'unknown'}" for name, one, two in pairs if one != two]
        own_templates = bool(templated) and reference.chat_template != other.chat_template
        if own_templates:
            different.append(f"chat templates of their own, so other prompts in {', '.join(templated)}")
        same = [task for task in tasks if not (own_templates and task in templated)]
        different += [note for task in same if (note := _prompts_note(reference.tasks[task], other.tasks[task], task))]
        if different:
            notes.append(f"{reference.model} and {other.model} differ in settings: {'; '.join(different)}")
    return notes


def _prompts_note(one: Evaluated, other: Evaluated, task: str) -> str:
    """Says of how many documents the prompts differ; empty if none do, or if an earlier version did not note them."""
    known = {(document.id, document.hash): document.prompt for document in one.documents}
    pairs = [(known.get((document.id, document.hash)), document.prompt) for document in other.documents]
    differing = sum(bool(first and second) and first != second for first, second in pairs)
    if not differing:
        return ""
    examples = f" (examples of {one.score.examples} and {other.score.examples})" if one.score.num_fewshot else ""
    return f"other prompts for {differing:,} of {len(pairs):,} documents of {task}{examples}"


def _templated(model: ModelResults, task: str) -> bool:
    return bool(model.settings.get(task, {}).get("chat_template"))


def _check_templates(task: str, reference: ModelResults, model: ModelResults) -> None:
    with_template, without = sorted((reference, model), key=lambda each: not _templated(each, task))
    if _templated(with_template, task) and not _templated(without, task):
        raise InputError(
            f"task {task!r}: {with_template.model} was asked with its chat template, {without.model} without",
            "evaluate both with the same settings",
        )


def _difference(task: str, one: ModelResults, other: ModelResults) -> Difference | None:
    """None if nothing is known about its uncertainty."""
    first, second = one.tasks[task], other.tasks[task]
    stderr: float | None
    fixed = 0.0
    if first.values() is None or second.values() is None:
        error = error_of_replicates(first, second)
        if error is None:
            return None
        stderr, fixed = error.stderr, error.fixed
        value = second.score.value - first.score.value
        clusters = [document.cluster for document in second.documents]
        p_value: float | None = _t_test(value, stderr, len(set(clusters)))
    else:
        differences, clusters = paired_differences(first, second)
        if len(differences) < min(len(first.documents), len(second.documents)):
            raise InputError(
                f"task {task!r}: only {len(differences):,} of the {len(second.documents):,} documents of {other.model} are "
                f"among the {len(first.documents):,} of {one.model}",
                "evaluate both on the same documents",
            )
        value = math.fsum(differences) / len(differences)
        stderr = (difference_error if _is_binary(first, second) else standard_error)(differences, clusters)
        p_value = _p_value(differences, value, stderr, len(set(clusters)))
        if second.score.has_tasks_as_clusters and stderr:
            fixed = _fixed_error(differences, clusters, stderr)
    return Difference(
        task=task,
        reference=one.model,
        model=other.model,
        value=value,
        stderr=stderr,
        interval=None if stderr is None else _interval(value, stderr, len(set(clusters))),
        p_value=p_value,
        adjusted=None,
        num_documents=len(clusters),
        needed=None,
        num_available=second.score.num_available,
        fixed_stderr=fixed,
    )


def _fixed_error(differences: Sequence[float], clusters: Sequence[str], stderr: float) -> float:
    """The part of a clustered standard error that comes from differences between the clusters: what is left of it without the
    variance within them, which is pooled over all. Zero if no cluster has two documents."""
    members: dict[str, list[float]] = defaultdict(list)
    for difference, cluster in zip(differences, clusters, strict=True):
        members[cluster].append(difference)
    freedom = len(differences) - len(members)
    if not freedom:
        return 0.0
    within = math.fsum(statistics.pvariance(own) * len(own) for own in members.values()) / freedom
    return math.sqrt(max(0.0, stderr**2 - within / len(differences)))


def _interval(value: float, stderr: float, groups: int) -> tuple[float, float]:
    reach = float(_stats().t.ppf((1 + CONFIDENCE) / 2, groups - 1)) * stderr
    return value - reach, value + reach


def _t_test(value: float, stderr: float, groups: int) -> float:
    """Two-sided."""
    if stderr == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * _stats().t.sf(abs(value) / stderr, groups - 1))


def _is_binary(*results: Evaluated) -> bool:
    """Whether every document was answered right or wrong."""
    return all(set(each.values() or ()) <= {0.0, 1.0} for each in results)


def _stats() -> ModuleType:
    """scipy.stats, imported on first use: it takes a quarter as long as everything that a run with nothing to do needs."""
    from scipy import stats

    return stats


def _check_settings(task: str, reference: ModelResults, model: ModelResults) -> None:
    for name in ("metric", "version", "num_fewshot", "split"):
        one, other = (getattr(each.tasks[task].score, name) for each in (reference, model))
        if one != other:
            raise InputError(
                f"task {task!r}: {reference.model} has {name} {one}, but {model.model} has {other}",
                "evaluate both with the same settings, or choose other tasks (--tasks on the command line)",
            )


def _p_value(differences: Sequence[float], value: float, stderr: float | None, groups: int) -> float | None:
    """Two-sided. For right or wrong answers to independent documents McNemar's exact test, otherwise the t test."""
    changed = [difference for difference in differences if difference]
    if groups == len(differences) and set(changed) <= {-1.0, 1.0}:
        better = sum(difference > 0 for difference in changed)
        return float(_stats().binomtest(better, len(changed)).pvalue) if changed else 1.0
    return None if stderr is None else _t_test(value, stderr, groups)


def _corrected(found: list[Difference]) -> list[Difference]:
    """The differences with Holm's correction, and with the documents that those which are not real would take."""
    ordered = sorted((each.p_value, number) for number, each in enumerate(found) if each.p_value is not None)
    adjusted: dict[int, float] = {}
    highest = 0.0
    for rank, (p_value, number) in enumerate(ordered):
        highest = max(highest, min(1.0, p_value * (len(ordered) - rank)))
        adjusted[number] = highest
    corrected = [replace(each, adjusted=adjusted.get(number)) for number, each in enumerate(found)]
    return [each if each.is_real else _with_needed(each, len(ordered)) for each in corrected]


def _with_needed(difference: Difference, comparisons: int) -> Difference:
    """At the level that Holm's correction asks of the first of `comparisons` differences, so rather too many documents."""
    if not difference.value or not difference.stderr:
        return difference
    level = (1 - CONFIDENCE) / comparisons
    distance = NormalDist().inv_cdf(1 - level / 2) + NormalDist().inv_cdf(POWER)
    fixed = difference.fixed_stderr**2
    allowed = (difference.value / distance) ** 2 - fixed  # variance that is left for what more documents reduce
    if allowed <= 0:
        return replace(difference, unreachable=True)
    needed = difference.num_documents * (difference.stderr**2 - fixed) / allowed
    return replace(difference, needed=max(math.ceil(needed), difference.num_documents + 1))
