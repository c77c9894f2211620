"""From a recipe's benchmark tasks to what lm-eval is asked."""

from __future__ import annotations

from collections.abc import Iterable

from minitron.evaluation import Task
from minitron_platform.recipes import schema as recipe


def lm_eval_tasks(settings: Iterable[recipe.Task]) -> tuple[Task, ...]:
    return tuple(Task(**task.model_dump()) for task in settings)
