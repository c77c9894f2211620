"""The result of a benchmark. Apart from the harness, which imports lm-eval: that takes seconds."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Standard error of the mean over documents; None for one document, or if the metric is not a mean over documents."""
    num_documents: int
    num_fewshot: int
    version: str
    """lm-eval's version of the task definition; scores of different versions cannot be compared."""
    split: str
    """The split whose documents were scored."""
    higher_is_better: bool | None
    """lm-eval's statement about the metric; False for a perplexity, None if unknown."""

    @property
    def shown_as(self) -> Metric:
        """Unit and format of `value` and `stderr`."""
        return task_metric(self.task, self.metric)
