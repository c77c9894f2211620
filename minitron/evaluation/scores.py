"""The result of a benchmark and of its documents. Apart from the harness, which imports lm-eval: that takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from minitron.evaluation.estimates import contributions, is_mean_of
from minitron.evaluation.metrics import Metric, task_metric


@dataclass(frozen=True)
class Score:
    """The result of one benchmark. `value` and `stderr` are in lm-eval's scale (0 to 1 for an accuracy); `shown_as` is the
    unit and format for tables."""

    task: str
    metric: str
    """lm-eval's name, for example "acc" or "acc_norm"; chosen by `minitron.evaluation.benchmarks.METRIC`."""
    value: float
    stderr: float | None
    """Standard error, which takes into account which documents belong together (`num_clusters`), and is not zero for a share of
    0 or 1 (`minitron.evaluation.uncertainty.score_error`). Of a metric that is neither a mean over documents nor a perplexity,
    the spread of `Evaluated.replicates`; of a group of such scores, that of its tasks' scores around it. None for one document
    or one group of them, and where the spread cannot be told: of scores that are not defined for all draws or all equal."""
    num_documents: int
    num_fewshot: int
    version: str
    """lm-eval's version of the task definition; scores of different versions cannot be compared."""
    split: str
    """The split whose documents were scored."""
    higher_is_better: bool | None
    """lm-eval's statement about the metric; False for a perplexity, None if unknown."""
    num_available: int | None = None
    """Number of documents of the split, of which the first `num_documents` were scored; None in results of earlier versions."""
    num_clusters: int | None = None
    """Number of groups of documents that belong together, such as subjects or the questions on one passage; None if each
    document is on its own."""
    num_tasks: int | None = None
    """Number of tasks of a group, to each of which a limit applies; None for one task, and in results of earlier
    versions."""
    examples: str | None = None
    """The split of the few-shot examples; None without, if the definition contains them, and in results of earlier versions."""

    @property
    def is_of_group(self) -> bool:
        """Whether this is the score of several tasks, whose names are the first parts of the documents' ids."""
        return self.num_tasks is not None and self.num_tasks > 1

    @property
    def has_tasks_as_clusters(self) -> bool:
        """Whether the groups of documents are the tasks of a group, such as subjects, so that more documents add none."""
        return self.is_of_group and self.num_clusters == self.num_tasks

    @property
    def is_mean_over_tasks(self) -> bool:
        """Whether this is the score of a group in which every task counts the same, of any number of documents."""
        return self.is_of_group and self.num_clusters is None

    @property
    def shown_as(self) -> Metric:
        """Unit and format of `value` and `stderr`."""
        return task_metric(self.task, self.metric)

    @property
    def text(self) -> str:
        """The score and its standard error, without metric and unit: "47.5 ± 4.6", or "47.5 ± -" where that cannot be told."""
        return self.shown_as.with_error(self.value, self.stderr)

    @property
    def documents(self) -> str:
        """The documents that were scored, in words: "first 40 of 1,172 documents of test", and of a group "228 of 14,042
        documents of test, the first ones of each of 57 tasks"."""
        if self.num_available is None:
            return f"first {self.num_documents:,} documents of {self.split}"
        if self.num_available == self.num_documents:
            return f"all {self.num_documents:,} documents of {self.split}"
        if self.is_of_group:
            return (
                f"{self.num_documents:,} of {self.num_available:,} documents of {self.split}, the first ones of each of "
                f"{self.num_tasks:,} tasks"
            )
        return f"first {self.num_documents:,} of {self.num_available:,} documents of {self.split}"

    @property
    def settings(self) -> str:
        """What the score was measured on, in words, with the limit: "5-shot, first 40 of 1,172 documents of test". Examples of
        another split than train are named: "5-shot with examples of dev, all 100 documents of test"."""
        clusters = f", ± by {self.num_clusters:,} groups of them" if self.num_clusters else ""
        examples = f" with examples of {self.examples}" if self.examples not in (None, "train") else ""
        return f"{self.num_fewshot}-shot{examples}, {self.documents}{clusters}"

    @property
    def sentence(self) -> str:
        """The score and what it was measured on: "acc 47.5 ± 4.6 % (0-shot, first 40 of 1,172 documents of test)"."""
        return f"{self.shown_as.sentence(self.text)} ({self.settings})"


def score_row(task: str, scores: Sequence[Score | None], absent: str = "") -> tuple[str, list[str]]:
    """The row of a benchmark in a table with a column for each model: its title, with metric, unit and what was measured, and
    the scores; `absent` for None. What was measured in another way says so itself. `scores` has one that is not None."""
    first = next(score for score in scores if score is not None)
    cells = [
        absent if score is None else score.text + ("" if score.settings == first.settings else f" ({score.settings})")
        for score in scores
    ]
    return f"{task} {first.shown_as.title} ({first.settings})", cells


@dataclass(frozen=True)
class MetricValue:
    """One of the metrics of a benchmark, in lm-eval's scale."""

    metric: str
    filter: str
    """lm-eval's name of the way in which answers are extracted; "none" if there is only one."""
    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class DocumentResult:
    """The result of one document."""

    id: str
    """Name of the task's part, such as a subject of MMLU, and the document's number in its split."""
    hash: str
    """SHA-256 of the document, hexadecimal; equal for the same document in another evaluation."""
    cluster: str
    """Equal for documents that belong together; otherwise the id."""
    values: dict[str, float]
    """By "METRIC,FILTER", for metrics that are a number for each document; of a perplexity the log-likelihood in nats."""
    prompt: str = ""
    """Hash of what the model was asked, 16 hexadecimal digits; empty in results of earlier versions."""
    weights: dict[str, float] = field(default_factory=dict)
    """By "METRIC,FILTER", the number of words or bytes that the log-likelihood is divided by; 1 where there is none."""

    @property
    def task(self) -> str:
        """Name of the task, for a document of a group."""
        return self.id.split("/", 1)[0]


@dataclass(frozen=True)
class Sample:
    """A document with what the model answered, to be read."""

    id: str
    value: float
    """Value of the benchmark's main metric; for a perplexity, that of this document."""
    prompt: str
    """The model's input; the text itself if the document is one, such as a page whose perplexity is measured."""
    target: str
    """Empty for a text."""
    answer: str
    """The choice that the metric counts, or the text that the model wrote."""
    extracted: str | None = None
    """What the task's filter took from the text, if that differs; None in results of earlier versions, whose `answer` it is. Of
    HumanEval and MBPP the program that was run, before its test."""
    problem: str | None = None
    """Last line of the error of a program that failed in the sandbox, and the line of the test that failed; None otherwise,
    and in results of earlier versions."""
    is_right: bool | None = None
    """Whether a choice is the right one, if its metric is one number for all documents, such as F1; then `value` is 1 or
    0. None for other metrics, and in results of earlier versions."""


@dataclass(frozen=True)
class Evaluated:
    """The result of one benchmark, with those of its documents."""

    score: Score
    filter: str
    """lm-eval's filter of the score's metric."""
    metrics: tuple[MetricValue, ...]
    documents: tuple[DocumentResult, ...]
    samples: tuple[Sample, ...] = ()
    """As many as were requested, the worst first."""
    replicates: tuple[float, ...] = ()
    """For a score that is not a mean over documents, the scores of documents drawn with replacement, the same ones
    for every model that is scored on these documents (`minitron.evaluation.estimates.replicates`); of a group, drawn within
    each of its tasks."""
    task_scores: dict[str, float] = field(default_factory=dict)
    """Scores of a group's tasks by name; empty for one task, and in results of earlier versions."""

    def numbers(self, name: str) -> dict[str, float]:
        """All metrics with their standard errors, by names that begin with `name`.

        "NAME.METRIC", with the filter behind it if the metric has several, except for the score's own; and
        "NAME.METRIC_stderr".
        """
        values: dict[str, float] = {}
        for each in self.metrics:
            alone = sum(other.metric == each.metric for other in self.metrics) == 1
            is_score = (each.metric, each.filter) == (self.score.metric, self.filter)
            key = f"{name}.{each.metric}{'' if alone or is_score else f' {each.filter}'}"
            values[key] = each.value
            if each.stderr is not None:
                values[f"{key}_stderr"] = each.stderr
        return values

    @property
    def main(self) -> str:
        """Key of the score's metric in the values of a document."""
        return f"{self.score.metric},{self.filter}"

    def values(self) -> list[float] | None:
        """One number per document, so that their mean is the score: the metric itself for a mean over documents, otherwise see
        `minitron.evaluation.estimates.contributions`. None if the score cannot be written as such a mean."""
        found = self.numbers_of(self.documents)
        return found if found is not None and is_mean_of(found, self.score.value) else None

    def numbers_of(self, documents: Sequence[DocumentResult]) -> list[float] | None:
        """As `values`, for some documents; their mean is the score of these documents alone."""
        grouped, by_task = self.score.is_of_group, self.score.is_mean_over_tasks
        return contributions_of(self.score.metric, self.main, documents, grouped=grouped, by_task=by_task)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evaluated:
        """The inverse of `dataclasses.asdict`."""
        return cls(
            score=Score(**values["score"]),
            filter=values["filter"],
            metrics=tuple(MetricValue(**each) for each in values["metrics"]),
            documents=tuple(DocumentResult(**each) for each in values["documents"]),
            samples=tuple(Sample(**each) for each in values["samples"]),
            replicates=tuple(values.get("replicates", ())),  # results of earlier versions have none
            task_scores=dict(values.get("task_scores", {})),
        )


def contributions_of(
    metric: str, key: str, documents: Sequence[DocumentResult], *, grouped: bool, by_task: bool = False
) -> list[float] | None:
    """`minitron.evaluation.estimates.contributions` of a metric, which documents have under `key`; None if one lacks it.

    grouped: whether the documents are those of several tasks, whose names are the first parts of their ids. by_task: whether
    the score is the mean over these tasks.
    """
    if not documents or any(key not in document.values for document in documents):
        return None
    return contributions(
        metric,
        [document.values[key] for document in documents],
        [document.weights.get(key, 1.0) for document in documents],
        [document.task if grouped else "" for document in documents],
        by_task=by_task,
    )


def worst_first(samples: Sequence[Sample], count: int, *, higher_is_better: bool | None) -> tuple[Sample, ...]:
    """The `count` samples with the worst values, in the order of the documents if values are equal."""
    sign = -1 if higher_is_better is False else 1

    def goodness(sample: Sample) -> float:
        return sign * sample.value if sample.is_right is None else float(sample.is_right)

    return tuple(sorted(samples, key=goodness)[:count])


def renamed(document: DocumentResult, part: str, cluster: str | None = None) -> DocumentResult:
    """A document of a part of a benchmark as one of the whole."""
    return replace(document, id=f"{part}/{document.id}", cluster=cluster or f"{part}/{document.cluster}")
