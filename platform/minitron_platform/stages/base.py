"""What the family's current model is cut from."""

from __future__ import annotations

from dataclasses import dataclass

from minitron.architecture import Architecture
from minitron_platform.stages.correct import Correct
from minitron_platform.stages.state import RunState
from minitron_platform.stages.teacher import Teacher


@dataclass(frozen=True)
class PruningBase:
    """A checkpoint folder, its identity and its shape."""

    folder: str
    id: str
    architecture: Architecture


def pruning_base(state: RunState) -> PruningBase:
    """The teacher, corrected if the recipe corrects it, or the finished student before the current one in the family."""
    if before := state.recipe.origin(state.member):
        student = state.student(before)
        return PruningBase(student.student, student.id, student.architecture)
    correct = state.output(Correct)
    return PruningBase(correct.folder, correct.id, state.output(Teacher).architecture)
