"""Differences of two models, with their uncertainty: paired where the results of every row and document are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minitron.errors import InputError
from minitron.evaluation.comparison import compare
from minitron.evaluation.metrics import Metric
from minitron.evaluation.result_file import ModelResults
from minitron.evaluation.scores import Score
from minitron.evaluation.uncertainty import standard_error
from minitron_platform.gates.documents import Documents

NORMAL_95 = 1.96


@dataclass(frozen=True)
class Worse:
    """By how much a model is worse than another; negative if it is better."""

    value: float
    """In the metric's stored scale."""
    reach: float | None
    """Half of the 95 % interval; None if it is not known."""
    paired: bool

    @property
    def at_least(self) -> float:
        """The least that it is worse by, with a confidence of 97.5 %; the difference itself if there is no interval."""
        return self.value if self.reach is None else self.value - self.reach

    def text(self, metric: Metric, measured_on: str = "") -> str:
        """As text, with its interval and, of a benchmark, what it was measured on."""
        interval = "no interval" if self.reach is None else f"±{metric.text(self.reach)}"
        way = " worse" if self.value > 0 else " better" if self.value < 0 else ""
        paired = ", paired" if self.paired else ""
        on = f"; {measured_on}" if measured_on else ""
        return f"{metric.text(abs(self.value))}{way} ({interval}{paired}{on})"


def worse_rows(
    name: str, mean: float, reference_mean: float, model: Documents | None, reference: Documents | None
) -> Worse:
    """For the held-out metric `name` (loss or kl), of which lower is better."""
    rows = [each.rows[name] for each in (model, reference) if each is not None]
    if len(rows) == 2 and len(rows[0]) == len(rows[1]) > 1 and all(map(math.isfinite, rows[0] + rows[1])):
        differences = [mine - other for mine, other in zip(*rows, strict=True)]
        stderr = standard_error(differences, range(len(differences)))
        assert stderr is not None
        return Worse(math.fsum(differences) / len(differences), NORMAL_95 * stderr, paired=True)
    return Worse(mean - reference_mean, None, paired=False)


def worse_task(
    task: str, score: Score, reference_score: Score, model: Documents | None, reference: Documents | None
) -> Worse | None:
    """For a benchmark; None if the two scores cannot be compared: another metric, or no statement on which way is better."""
    settings = ("metric", "version", "num_fewshot", "split", "num_documents", "higher_is_better")
    if score.higher_is_better is None or any(getattr(score, s) != getattr(reference_score, s) for s in settings):
        return None
    sign = -1 if score.higher_is_better else 1
    both = [each for each in (reference, model) if each is not None and task in each.tasks]
    if len(both) == 2 and (found := _paired(task, both)) is not None:
        return Worse(sign * found.value, found.reach, paired=True)
    errors = [score.stderr, reference_score.stderr]
    known = [error for error in errors if error is not None and not math.isnan(error)]
    reach = NORMAL_95 * math.hypot(*known) if len(known) == 2 else None
    return Worse(sign * (score.value - reference_score.value), reach, paired=False)


def _paired(task: str, both: Sequence[Documents]) -> Worse | None:
    """The second one's score minus the first one's; None if they were not scored on the same documents."""
    results = [
        ModelResults(name, "", 0, "", "", {task: each.tasks[task]})
        for name, each in zip(("the other", "the version"), both, strict=True)
    ]
    try:
        (difference,) = compare(results)
    except InputError:
        return None
    if difference.interval is None:
        return None
    return Worse(difference.value, difference.interval[1] - difference.value, paired=True)
