"""Models that papers have pruned and distilled, with the benchmark scores that the papers state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SECOND_PAPER = "arXiv 2408.11796, table 1"
SHOTS = {
    "winogrande": 5,
    "arc_challenge": 25,
    "mmlu": 5,
    "hellaswag": 10,
    "gsm8k": 5,
    "truthfulqa_mc2": 0,
    "xlsum_en": 3,  # on 20 percent of the documents
    "mbpp": 0,
    "humaneval": 0,
}
"""Number of examples in the prompt that the papers' scores are for, by lm-eval's name of the task, in the papers' order."""


@dataclass(frozen=True)
class Published:
    """A published model. Scores are between 0 and 1, by lm-eval's name of the task."""

    name: str
    parameters: float
    scores: dict[str, float]
    source: str
    """Paper and table."""

    def score(self, task: str, shots: int) -> float | None:
        """The score on a task with `shots` examples in the prompt; None if the paper states none for that."""
        return self.scores.get(task) if SHOTS.get(task) == shots else None


def sources(models: Iterable[Published]) -> str:
    """Where the scores of `models` are from, each source once: "arXiv 2408.11796, table 1 (Minitron 4B, …)"."""
    names: dict[str, list[str]] = {}
    for model in models:
        names.setdefault(model.source, []).append(model.name)
    return "; ".join(f"{source} ({', '.join(own)})" for source, own in names.items())


def _model(name: str, billions: float, *percent: float | None, source: str = SECOND_PAPER) -> Published:
    scores = {task: value / 100 for task, value in zip(SHOTS, percent, strict=True) if value is not None}
    return Published(name, billions * 1e9, scores, source)


# Also the teachers of the second paper; the "corrected" one was fine-tuned on the text of the distillation.
PUBLISHED = (
    _model("Minitron 4B", 4.2, 74.0, 50.9, 58.6, 75.0, 24.1, 42.9, 29.5, 28.2, 23.3),
    _model(
        "Minitron 8B", 8.3, 79.0, 52.6, 63.8, 80.7, 51.3, 42.6, 31.2, 35.2, 31.6, source="arXiv 2407.14679, table 2"
    ),
    _model("Llama-3.1-Minitron 4B depth", 4.5, 72.1, 52.6, 58.7, 73.2, 16.8, 38.2, 27.2, 30.7, None),
    _model("Llama-3.1-Minitron 4B width", 4.5, 73.5, 55.6, 60.5, 76.1, 41.2, 42.9, 28.7, 32.4, None),
    _model("MN-Minitron 8B", 8.4, 80.4, 64.4, 69.5, 83.0, 58.5, 47.6, 32.0, 43.8, 36.2),
    _model("Llama 3.1 8B", 8.0, 77.3, 57.9, 65.3, 81.8, 48.6, 45.0, 30.0, 42.3, 24.8),
    _model("Mistral NeMo 12B", 12.2, 82.2, 65.1, 69.0, 85.2, 56.4, 49.8, 33.4, 42.6, 23.8),
    _model("Mistral NeMo 12B corrected", 12.2, 82.7, 62.3, 70.1, 85.3, 55.7, 48.3, 31.9, 47.9, 23.8),
)
