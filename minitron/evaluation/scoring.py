"""From lm-eval's results of a task to a score with a standard error, all other metrics, and the result of each document."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np

from minitron.errors import InputError
from minitron.evaluation.benchmarks import FILTER, METRIC
from minitron.evaluation.estimates import group_replicates, is_mean_of, replicates
from minitron.evaluation.metrics import task_metric
from minitron.evaluation.scores import (
    DocumentResult,
    Evaluated,
    MetricValue,
    Sample,
    Score,
    contributions_of,
    renamed,
    worst_first,
)
from minitron.evaluation.uncertainty import passage_of, score_error, standard_error
from minitron.storage import fingerprint

PER_WORD_OR_BYTE = ("word_perplexity", "byte_perplexity", "bits_per_byte")  # lm-eval has a pair for each document
LARGEST_EXPONENT = 700.0  # of a perplexity that is a number
LONGEST_TEXT = 20_000  # characters of a prompt or answer that is kept; of a longer one the end


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
        metrics[metrics.index(main)] = main = replace(main, stderr=_spread(drawn))
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
        _sample(built, sample, metric) for sample in results["samples"][part] if samples and sample["filter"] == chosen
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
            if (value := _number(sample[metric])) is not None:
                own[key] = value
            elif (pair := _log_likelihood(metric, sample[metric])) is not None:
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


def _number(value: Any) -> float | None:
    """A metric of a document; None if it is not one number."""
    if isinstance(value, bool | int | float | np.number | np.bool_):
        return float(value)
    return None


def _log_likelihood(metric: str, value: Any) -> tuple[float, float] | None:
    """Log-likelihood and number of words or bytes of a document; None for other metrics."""
    if metric not in PER_WORD_OR_BYTE or not isinstance(value, tuple | list):
        return None
    total, units = value
    return float(total), float(units)


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
        stderr=_stderr(metric, key, value, documents),
        higher_is_better=built.higher_is_better()[metric],
    )


def _stderr(metric: str, key: str, value: float, documents: Sequence[DocumentResult]) -> float | None:
    """None if `value` is not the mean of one number for each document."""
    found = _contributions(metric, key, value, documents)
    return None if found is None else score_error(found, [each.cluster for each in documents])


def _contributions(metric: str, key: str, value: float, documents: Sequence[DocumentResult]) -> list[float] | None:
    """Numbers of the documents of a task whose mean is `value`; None if there are none."""
    found = contributions_of(metric, key, documents, grouped=False)
    return found if found is not None and is_mean_of(found, value) else None


def _replicates(
    built: Any, metric: str, name: str, samples: Sequence[Mapping[str, Any]], documents: Sequence[DocumentResult]
) -> tuple[float, ...]:
    """Of a metric that is no mean of one number for each document, such as F1 or BLEU. name: of lm-eval's filter."""
    items = {
        str(each["doc_id"]): each[metric] for each in samples if each["filter"] == name and metric in each["metrics"]
    }
    having = [document for document in documents if document.id in items]
    clusters = [document.cluster for document in having]
    return replicates(built.aggregation()[metric], [items[document.id] for document in having], clusters)


def _spread(replicates: Sequence[float]) -> float | None:
    """Their standard deviation; None if all are equal, as where every answer is wrong: that does not show that all would be."""
    return statistics.stdev(replicates) or None if replicates else None


def pooled(task: str, members: Mapping[str, Evaluated], samples: int, *, by_size: bool = True) -> Evaluated:
    """The result of a group of tasks: the mean over all their documents, or with `by_size` false over the tasks.

    members: by name. The documents of one member belong together (the subjects of MMLU), unless the mean is over the tasks or
    there is only one.
    """
    by_size = by_size and len(members) > 1
    scores = [member.score for member in members.values()]
    first = next(iter(members.values()))
    if metrics_of := {score.metric for score in scores} - {first.score.metric}:
        raise InputError(
            f"task {task!r}: its tasks have different metrics ({first.score.metric}, {', '.join(sorted(metrics_of))})",
            "name its tasks one by one",
        )
    everywhere = [
        each
        for each in first.metrics
        if all(
            (each.metric, each.filter) in {(m.metric, m.filter) for m in other.metrics} for other in members.values()
        )
    ]
    documents = tuple(
        renamed(document, name, cluster=name if by_size else None)
        for name, member in members.items()
        for document in member.documents
    )
    sizes = [score.num_documents if by_size else 1 for score in scores]

    def total(value: Callable[[Evaluated], float]) -> float:
        return sum(value(each) * size for each, size in zip(members.values(), sizes, strict=True)) / sum(sizes)

    metrics = []
    for each in everywhere:
        values = [
            next(own for own in member.metrics if (own.metric, own.filter) == (each.metric, each.filter))
            for member in members.values()
        ]
        value = sum(own.value * size for own, size in zip(values, sizes, strict=True)) / sum(sizes)
        if not by_size:
            known = [own.stderr for own in values if own.stderr is not None]
            stderr = math.sqrt(sum(one**2 for one in known)) / len(values) if len(known) == len(values) else None
        else:
            stderr = _stderr(each.metric, f"{each.metric},{each.filter}", value, documents)
            if (
                stderr is None
            ):  # the score is that of no mean over documents, but a mean of the tasks' scores all the same
                of_task = dict(zip(members, (own.value for own in values), strict=True))
                tasks = [document.task for document in documents]
                stderr = standard_error([of_task[task] for task in tasks], tasks) or None  # zero would be chance
        metrics.append(MetricValue(each.metric, each.filter, value, stderr, each.higher_is_better))
    main = next((m for m in metrics if (m.metric, m.filter) == (first.score.metric, first.filter)), None)
    available = [score.num_available or score.num_documents for score in scores]
    score = Score(
        task=task,
        metric=first.score.metric,
        value=total(lambda member: member.score.value),
        stderr=main.stderr if main else None,
        num_documents=sum(each.num_documents for each in scores),
        num_fewshot=first.score.num_fewshot,
        version=first.score.version,
        split=first.score.split,
        higher_is_better=first.score.higher_is_better,
        num_available=sum(available),
        num_clusters=len(members) if by_size else None,
        num_tasks=len(members),
        examples=first.score.examples,
    )
    kept = [replace(sample, id=f"{name}/{sample.id}") for name, member in members.items() for sample in member.samples]
    result = Evaluated(
        score,
        first.filter,
        tuple(metrics),
        documents,
        worst_first(kept, samples, higher_is_better=score.higher_is_better),
        task_scores={name: member.score.value for name, member in members.items()},
    )
    if result.values() is not None:
        return result
    weights = {name: size / sum(sizes) for name, size in zip(members, sizes, strict=True)}
    drawn = group_replicates({name: _drawn(member) for name, member in members.items()}, weights)
    within = _spread(drawn)
    if score.stderr is None and not by_size:
        score = replace(score, stderr=within)
    elif by_size and main and main.stderr is not None and within is not None and within > main.stderr:
        # a few tasks may lie close together by chance; the error of drawing documents is in that of drawing tasks
        score, wider = replace(score, stderr=within), replace(main, stderr=within)
        result = replace(result, metrics=tuple(wider if each is main else each for each in result.metrics))
    return replace(result, score=score, replicates=drawn)


def _drawn(member: Evaluated) -> tuple[float, ...]:
    """The replicates of a task, also of one whose score happens to be a mean over documents."""
    values = member.values()
    if values is None:
        return member.replicates
    return replicates(statistics.fmean, values, [document.cluster for document in member.documents])


def _sample(built: Any, sample: Mapping[str, Any], metric: str) -> Sample | None:
    """A document with the model's answer; None if it can neither be shown by the metric nor by whether the answer is right."""
    if (pair := _log_likelihood(metric, sample.get(metric))) is not None:
        return _text_sample(sample, metric, *pair)
    value = _number(sample.get(metric))
    if value is None:
        return _right_or_wrong(built, sample, metric) if built.OUTPUT_TYPE == "multiple_choice" else None
    if metric == "perplexity":  # of a document the log-likelihood
        value = _perplexity(value)
    return _answer_sample(built, sample, metric, value)


def _text_sample(sample: Mapping[str, Any], metric: str, total: float, units: float) -> Sample:
    """A document that is one text, with its own perplexity. total: its log-likelihood in nats. units: its words or bytes."""
    unit = "words" if metric == "word_perplexity" else "bytes"
    text = str(sample["arguments"][0][0])
    mean = total / max(1.0, units)
    return Sample(
        id=str(sample["doc_id"]),
        value=-mean / math.log(2) if metric == "bits_per_byte" else _perplexity(mean),
        prompt=text[-LONGEST_TEXT:],
        target="",
        answer=f"log-likelihood {total:,.1f} nats, of {units:,.0f} {unit}",
    )


def _perplexity(log_likelihood: float) -> float:
    return math.exp(min(-log_likelihood, LARGEST_EXPONENT))


def _right_or_wrong(built: Any, sample: Mapping[str, Any], metric: str) -> Sample:
    """A document of a metric that is one number for all of them, such as F1: whether the model's choice is the right one."""
    right = built.doc_to_text(sample["doc"]) if built.multiple_input else sample["target"]
    allowed = right if isinstance(right, list) else [right]
    best = _chosen(built, sample, metric)
    is_right = best in allowed or _choices(built, sample)[best] in allowed
    return replace(_answer_sample(built, sample, metric, float(is_right)), is_right=is_right)


def _answer_sample(built: Any, sample: Mapping[str, Any], metric: str, value: float) -> Sample:
    requests, answers = sample["arguments"], sample["filtered_resps"]
    scored = all(isinstance(answer, list | tuple) and len(answer) == 2 for answer in answers)
    extracted = None
    if scored and len(requests) > 1:  # choices: (log-likelihood, greedy) of each
        best = _chosen(built, sample, metric)
        if built.multiple_input:  # the choices are in the questions, and what follows them is the same
            return _chosen_question(built, sample, value, best)
        answer = str(requests[best][1])
    elif built.OUTPUT_TYPE == "generate_until":
        answer, extracted = _joined(sample["resps"]), _joined(answers)
    else:
        answer = _joined(answers)
    target = sample["target"]
    if scored and isinstance(target, int) and 0 <= target < len(requests):
        target = requests[target][1]
    return Sample(
        id=str(sample["doc_id"]),
        value=value,
        prompt=str(requests[0][0])[-LONGEST_TEXT:],
        target=str(target)[-LONGEST_TEXT:],
        answer=answer[-LONGEST_TEXT:],
        extracted=None if extracted in (None, answer) else extracted[-LONGEST_TEXT:],
    )


def _joined(answers: Sequence[Any]) -> str:
    """The texts of a document, of which each request may have several."""
    return "\n".join(str(text) for each in answers for text in (each if isinstance(each, list) else [each]))


def _choices(built: Any, sample: Mapping[str, Any]) -> list[str]:
    has_choices = built.config.doc_to_choice is not None  # a task that is a class may have none
    texts = built.doc_to_choice(sample["doc"]) if has_choices else [request[1] for request in sample["arguments"]]
    return [str(text) for text in texts]


def _chosen(built: Any, sample: Mapping[str, Any], metric: str) -> int:
    """The choice that `metric` takes for the model's answer. Source: `ConfigurableTask.process_results` of lm-eval."""
    choices = _choices(built, sample)
    values = [float(answer[0]) for answer in sample["filtered_resps"]]
    if metric == "acc_mutual_info":  # the second half is the choices without the question
        values = [value - alone for value, alone in zip(values, values[len(choices) :], strict=False)]
    lengths = {"acc_norm": len, "acc_bytes": lambda choice: len(choice.encode())}.get(metric, lambda _: 1)
    return max(range(len(choices)), key=lambda number: values[number] / max(1, lengths(choices[number])))


def _chosen_question(built: Any, sample: Mapping[str, Any], value: float, best: int) -> Sample:
    """A document whose choices are the beginnings of one continuation, as Winogrande's: each is shown with it."""
    requests = sample["arguments"]
    begun = [str(request[0]) for request in requests]
    common = next(n for n, letters in enumerate(zip_longest(*begun)) if len(set(letters)) > 1)
    common = begun[0].rfind(" ", 0, common) + 1  # whole words
    texts = [f"{begin[common:]}{request[1]}" for begin, request in zip(begun, requests, strict=True)]
    right = built.doc_to_text(sample["doc"])
    target = texts[right] if isinstance(right, int) else sample["target"]
    kept = (begun[0][:common].rstrip(), str(target), texts[best])
    prompt, target, answer = (text[-LONGEST_TEXT:] for text in kept)
    return Sample(id=str(sample["doc_id"]), value=value, prompt=prompt, target=target, answer=answer)
