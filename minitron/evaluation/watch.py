"""Benchmarks of a model in training: changes since the first measurement, their noise, and the alarm if one falls with the KL.

All measurements are on the same documents, so that a change is paired by document. Its noise band is the confidence interval of
a change of zero at 5 % over all tasks and measurements of the training together (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from minitron.evaluation.pairs import CONFIDENCE, error_of_replicates, paired_differences
from minitron.evaluation.scores import Evaluated
from minitron.evaluation.uncertainty import standard_error


@dataclass(frozen=True)
class Change:
    """The change of a score since the first measurement, in lm-eval's scale."""

    value: float
    band: float
    """Half the width of the noise band: a change of at most this size may be chance."""


@dataclass(frozen=True)
class Fall:
    """A task that has become worse by more than noise while the KL to the teacher has fallen."""

    task: str
    step: int
    text: str
    """In words, for the user."""


class TaskWatch:
    """The measurements of a training.

    measurements: number of them that are planned for each task. first: the first measurement of an interrupted training, as
    `first` has it.
    """

    def __init__(self, measurements: int, first: Mapping[str, Any] | None = None) -> None:
        self.measurements = measurements
        self.first: dict[str, Any] | None = None if first is None else dict(first)
        """A JSON value: {step, kl, tasks}; None before the first measurement."""

    def add(self, step: int, results: Mapping[str, Evaluated], kl: float) -> tuple[dict[str, Change], list[Fall]]:
        """Changes by task since the first measurement, and the tasks to raise an alarm for.

        kl: the held-out KL to the teacher at this step, nats per token. Tasks whose score has no standard error have no change.
        """
        # Also if a training is resumed from an earlier step, or from a first measurement of a version that knew no KL there.
        if self.first is None or self.first["kl"] is None or step <= self.first["step"]:
            tasks = {key: asdict(result) for key, result in results.items()}
            self.first = {"step": step, "kl": kl, "tasks": tasks}
            return {}, []
        changes: dict[str, Change] = {}
        falls: list[Fall] = []
        for key, result in results.items():
            before = self.first["tasks"].get(key)
            change = None if before is None else self._change(Evaluated.from_dict(before), result, len(results))
            if change is None:
                continue
            changes[key] = change
            worse = change.value > 0 if result.score.higher_is_better is False else change.value < 0
            kl_before = self.first["kl"]
            if worse and abs(change.value) > change.band and kl < kl_before:
                falls.append(Fall(key, step, _text(key, result, change, self.first["step"], step, kl_before, kl)))
        return changes, falls

    def _change(self, before: Evaluated, now: Evaluated, tasks: int) -> Change | None:
        if before.values() is None or now.values() is None:
            error = error_of_replicates(before, now)
            value, stderr = now.score.value - before.score.value, None if error is None else error.stderr
        else:
            differences, clusters = paired_differences(before, now)
            value = sum(differences) / max(1, len(differences))
            stderr = standard_error(differences, clusters) if differences else None
        if stderr is None:
            return None
        level = (1 - CONFIDENCE) / max(1, tasks * self.measurements)
        return Change(value, NormalDist().inv_cdf(1 - level / 2) * stderr)


def _text(key: str, result: Evaluated, change: Change, first: int, step: int, kl_before: float, kl: float) -> str:
    metric = result.score.shown_as
    return (
        f"{key} {metric.name} changed by {metric.text(change.value)} {metric.unit} from step {first} to step {step}, more than "
        f"chance ({metric.text(change.band)}) on its {result.score.documents}, while the KL to the teacher fell from "
        f"{kl_before:.3f} to {kl:.3f}"
    )
