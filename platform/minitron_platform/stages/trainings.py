"""What the stages that train have in common: settings for the GPUs' memory, progress and restarts."""

from __future__ import annotations

from minitron import storage
from minitron.distill import DistillConfig
from minitron.distill.gpu_memory import TeacherKept
from minitron_platform.estimates.gpu import GpuTraining
from minitron_platform.recipes.build import distill_config
from minitron_platform.recipes.schema import Training
from minitron_platform.stages.context import Context
from minitron_platform.tracking.restarts import RESTARTS
from minitron_platform.training.view import TrainingView


def training_settings(
    context: Context, stage: str, training: Training, on_gpus: GpuTraining | None
) -> tuple[DistillConfig, TeacherKept | None]:
    """Hyperparameters of a stage's training, and which part of the teacher each GPU has; `on_gpus` is None on CPUs.

    On GPUs they are chosen by memory, reported, and noted in the stage's record. Raises InputError if nothing fits.
    """
    if on_gpus is None:
        return distill_config(training), None
    fit = on_gpus.check(stage)
    context.console.say(f"  {fit.settings} · {fit.memory} of each GPU, estimated")
    context.log(stage).params({**fit.values, "gpu_memory_estimate": fit.memory.peak})
    return fit.config, fit.teacher_kept


def training_view(context: Context, stage: str, folder: str, steps: int) -> TrainingView:
    """Progress of a training of `steps` steps that a stage runs in its `folder`."""
    resources = context.recipe.resources
    restarts = storage.join(folder, RESTARTS)
    return TrainingView(
        context.console,
        context.log(stage),
        steps,
        restarts=restarts,
        max_failures=resources.max_failures,
        before_commit=context.fences.check,
    )
