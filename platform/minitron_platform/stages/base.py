"""The model that the family's current model is pruned from."""

from __future__ import annotations

from dataclasses import dataclass

from minitron.architecture import Architecture
from minitron_platform.stages.correct import Correct
from minitron_platform.stages.state import RunState
from minitron_platform.stages.teacher import Teacher


@dataclass(frozen=True)
class PruningBase:
    """A checkpoint to prune."""

    folder: str
    """Folder of the checkpoint."""
    id: str
    """Content address of the model."""
    architecture: Architecture


def pruning_base(state: RunState) -> PruningBase:
    """The model that the current one is pruned from: the teacher, corrected if the recipe says so, or the finished student
    before it in the family."""
    previous = state.recipe.origin(state.member)
    if previous:
        student = state.student(previous)
        return PruningBase(student.student, student.id, student.architecture)
    correct = state.output(Correct)
    return PruningBase(correct.folder, correct.id, state.output(Teacher).architecture)
