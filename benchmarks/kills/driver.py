"""`minitron` as the driver of such a run: text is divided into tasks and small parts, and each training step is written down.

    python -m benchmarks.kills.driver STEPS run RECIPE …

Each reported step becomes a line of the file STEPS: the training's folder or the candidate, and the step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from minitron.data import parts
from minitron_platform.cli.commands import main
from minitron_platform.stages import data
from minitron_platform.stages.trial_records import TrialsView
from minitron_platform.training.events import Measured
from minitron_platform.training.view import TrainingView
from minitron_platform.workers import group
from minitron_search.events import Progress


def note_steps(path: Path) -> None:
    """Write down each step that a training or a trial reports from now on."""
    training_event, trial_event = TrainingView.event, TrialsView.event

    def note(training: str, step: int) -> None:
        with path.open("a") as file:
            file.write(json.dumps([training, step]) + "\n")

    def of_training(self: TrainingView, event: Any) -> None:
        if isinstance(event, Measured) and "tokens_per_second" in event.values:
            note(self.path, event.step)
        training_event(self, event)

    def of_trial(self: TrialsView, architecture: Any, event: Any) -> None:
        if isinstance(event, Progress):
            note(str(architecture), event.step)
        trial_event(self, architecture, event)

    TrainingView.event, TrialsView.event = of_training, of_trial  # type: ignore[method-assign]


if __name__ == "__main__":
    parts.PART_BYTES, data.TASK_TOKENS, group.RESIZE_SECONDS = 100_000, 0, 1.0
    note_steps(Path(sys.argv.pop(1)))
    main()
