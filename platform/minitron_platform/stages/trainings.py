"""What the stages that train on Ray Train share: the view of a training, and its restarts."""

from __future__ import annotations

from minitron import storage
from minitron_platform.stages.context import Context
from minitron_platform.tracking.restarts import Restart, read_restarts
from minitron_platform.training.view import RESTARTS, TrainingView


def training_view(context: Context, stage: str, folder: str, steps: int) -> TrainingView:
    """The view of a training of a stage whose results are in `folder`."""
    resources = context.recipe.resources
    restarts = storage.join(folder, RESTARTS)
    return TrainingView(
        context.console, context.log(stage), steps, restarts=restarts, max_failures=resources.max_failures
    )


def restarts_of(folder: str) -> list[Restart]:
    """Restarts of the trainings of a stage, for its output."""
    return read_restarts(storage.join(folder, RESTARTS))
