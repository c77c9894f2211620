"""Models that papers have pruned and distilled, with the benchmark scores that the papers state."""

from __future__ import annotations

from dataclasses import dataclass

PAPER = "arXiv 2408.11796, table 1, August 2024"
_BENCHMARKS = ("winogrande", "arc_challenge", "mmlu", "hellaswag", "gsm8k")
SHOTS = dict(zip(_BENCHMARKS, (5, 25, 5, 10, 5), strict=True))
"""Number of examples in the prompt that the paper's scores are for, by lm-eval's name of the task."""


@dataclass(frozen=True)
class Published:
    """A published model. Scores are accuracies between 0 and 1, by lm-eval's name of the task."""

    name: str
    parameters: float
    scores: dict[str, float]

    def score(self, task: str, shots: int) -> float | None:
        """The score on a task with `shots` examples in the prompt; None if the paper states none for that."""
        return self.scores.get(task) if SHOTS.get(task) == shots else None


def _model(name: str, billions: float, *percent: float) -> Published:
    scores = {task: value / 100 for task, value in zip(_BENCHMARKS, percent, strict=True)}
    return Published(name, billions * 1e9, scores)


PUBLISHED = (
    _model("Minitron 4B", 4.2, 74.0, 50.9, 58.6, 75.0, 24.1),
    _model("Llama-3.1-Minitron 4B depth", 4.5, 72.1, 52.6, 58.7, 73.2, 16.8),
    _model("Llama-3.1-Minitron 4B width", 4.5, 73.5, 55.6, 60.5, 76.1, 41.2),
    _model("MN-Minitron 8B", 8.4, 80.4, 64.4, 69.5, 83.0, 58.5),
    _model("Llama 3.1 8B", 8.0, 77.3, 57.9, 65.3, 81.8, 48.6),
)
