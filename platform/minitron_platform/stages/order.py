"""The list of all stages, and the order in which a run carries them out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minitron_platform.recipes.schema import Member, Recipe
from minitron_platform.stages.calibrate import Calibrate
from minitron_platform.stages.correct import Correct
from minitron_platform.stages.data import Data
from minitron_platform.stages.distill import Distill
from minitron_platform.stages.evaluate import Evaluate
from minitron_platform.stages.register import Register
from minitron_platform.stages.search import Search
from minitron_platform.stages.stage import Stage
from minitron_platform.stages.targets import Targets
from minitron_platform.stages.teacher import Teacher

STAGES: tuple[Stage[Any], ...] = (
    Teacher(),
    Data(),
    Correct(),
    Calibrate(),
    Targets(),
    Search(),
    Distill(),
    Evaluate(),
    Register(),
)


def steps(recipe: Recipe) -> Iterator[tuple[Stage[Any], Member | None]]:
    """Every stage of a run in order, with the model of the family that it is for; None for a stage that the family shares."""
    for number, member in enumerate(recipe.family):
        for stage in STAGES:
            if stage.per_model:
                yield stage, member
            elif number == 0:
                yield stage, None


def stage_names() -> tuple[str, ...]:
    """Names of all stages, in order."""
    return tuple(stage.name for stage in STAGES)
