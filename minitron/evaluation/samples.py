"""lm-eval's samples, one for each document and filter: the numbers of the document, and the model's answer to be read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np

from minitron.evaluation.scores import Sample

PER_WORD_OR_BYTE = ("word_perplexity", "byte_perplexity", "bits_per_byte")  # lm-eval has a pair for each document
LARGEST_EXPONENT = 700.0  # of a perplexity that is a number
LONGEST_TEXT = 20_000  # characters of a prompt or answer that is kept; of a longer one the end


def number_of(value: Any) -> float | None:
    """A metric of a document; None if it is not one number."""
    if isinstance(value, bool | int | float | np.number | np.bool_):
        return float(value)
    return None


def log_likelihood(metric: str, value: Any) -> tuple[float, float] | None:
    """Log-likelihood and number of words or bytes of a document; None for other metrics."""
    if metric not in PER_WORD_OR_BYTE or not isinstance(value, tuple | list):
        return None
    total, units = value
    return float(total), float(units)


def shown_sample(built: Any, sample: Mapping[str, Any], metric: str) -> Sample | None:
    """A document with the model's answer; None if it can neither be shown by the metric nor by whether the answer is right."""
    if (pair := log_likelihood(metric, sample.get(metric))) is not None:
        return _text_sample(sample, metric, *pair)
    value = number_of(sample.get(metric))
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
