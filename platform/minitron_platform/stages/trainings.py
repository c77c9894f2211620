"""Progress and restarts of the trainings on Ray Train, which two stages run."""

from __future__ import annotations

from minitron import storage
from minitron_platform.stages.context import Context
from minitron_platform.tracking.restarts import Restart, read_restarts
from minitron_platform.training.view import RESTARTS, TrainingView


def training_view(context: Context, stage: str, folder: str, steps: int) -> TrainingView:
    """Progress of a training of `steps` steps that a stage runs in its `folder`."""
    resources = context.recipe.resources
    restarts = storage.join(folder, RESTARTS)
    return TrainingView(
        context.console, context.log(stage), steps, restarts=restarts, max_failures=resources.max_failures
    )


def restarts_of(folder: str) -> list[Restart]:
    """Restarts of the trainings in a stage's `folder`, including those of earlier runs."""
    return read_restarts(storage.join(folder, RESTARTS))
