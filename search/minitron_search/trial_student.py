"""The student of a trial: pruned in the memory of one process, or read and written in parts by several that share it."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Protocol

import torch.distributed as dist
from torch import nn

from minitron import storage
from minitron.architecture import Architecture
from minitron.checkpoints.files import Checkpoint
from minitron.device import DTYPES, device
from minitron.distill.inputs import DistillInputs
from minitron.distill.teacher.live import LiveTeacher
from minitron.logits import Head
from minitron.meta_models import open_model, write_model
from minitron.models import quiet_transformers
from minitron.processes import wait_for_all
from minitron.pruning.source import PruningSource
from minitron_search.search_task import SearchTask
from minitron_search.trial_store import pruned, weights


class TrialStudent(Protocol):
    """A candidate before and after its distillation."""

    model: nn.Module
    """What is distilled."""
    weights: Checkpoint | None
    """What `model` is read from; None if it is in memory."""
    teacher_head: Head

    def untrained(self) -> nn.Module:
        """The candidate before its distillation, for measurements by all processes together."""
        ...

    def trained(self) -> nn.Module:
        """The same after it, saved if the task keeps weights."""
        ...

    def finish(self) -> None:
        """Delete files that are not needed any more."""
        ...


def trial_student(task: SearchTask, architecture: Architecture) -> TrialStudent:
    """The student of a trial in this process or, with torch.distributed, in each of several."""
    if task.config.shard and dist.is_initialized() and dist.get_world_size() > 1:
        return _Sharded(task, architecture)
    return _Whole(task, architecture)


@lru_cache(maxsize=1)
def source(materials: DistillInputs, origin: PruningSource) -> tuple[nn.Module, Head]:
    """The model that candidates are pruned from and the teacher's head; cached for a worker's next candidate."""
    return materials.source(origin)


def is_rank_zero() -> bool:
    """Whether this process is the one that writes, of all that train together."""
    return not dist.is_initialized() or dist.get_rank() == 0


class _Whole:
    weights: Checkpoint | None = None

    def __init__(self, task: SearchTask, architecture: Architecture) -> None:
        self.task, self.architecture = task, architecture
        self.model, self.teacher_head = task.materials.student(task.origin, architecture)

    def untrained(self) -> nn.Module:
        return self.model

    def trained(self) -> nn.Module:
        target = weights(self.task.folder, self.architecture)
        if self.task.keep_weights and is_rank_zero() and not storage.is_committed(target):
            commit = storage.committed_folder(target, before_commit=self.task.before_commit)
            with commit as folder, quiet_transformers():
                self.model.save_pretrained(str(folder))  # type: ignore[operator]
        return self.model

    def finish(self) -> None:
        """There are no files."""


class _Sharded:
    """No process has the whole student, nor the model that it is pruned from, which the first process reads one tensor at a
    time. The first process writes the student, and all read their parts of it."""

    weights: Checkpoint | None

    def __init__(self, task: SearchTask, architecture: Architecture) -> None:
        self.task, self.architecture = task, architecture
        self.dtype = DTYPES[task.materials.dtype]
        self.folder = pruned(task.folder, architecture)
        if is_rank_zero() and not storage.is_committed(self.folder):
            task.origin.write_student(architecture, self.folder, before_commit=task.before_commit)
        wait_for_all()
        self.teacher_head = task.materials.teacher_head()
        self.model, self.files = open_model(storage.fetch(self.folder), self.dtype)
        self.weights = self.files

    def untrained(self) -> nn.Module:
        return self._sharded(self.folder)

    def trained(self) -> nn.Module:
        target = weights(self.task.folder, self.architecture)
        commit = storage.committed_folder(target, before_commit=self.task.before_commit)
        with commit if is_rank_zero() else nullcontext() as folder:
            write_model(self.model, self.files, self.dtype, folder)
        del self.model  # its float32 weights
        wait_for_all()
        return self._sharded(target)

    def finish(self) -> None:
        wait_for_all()
        if is_rank_zero():
            self.task.before_commit()
            storage.remove(self.folder)
            if not self.task.keep_weights:
                storage.remove(weights(self.task.folder, self.architecture))

    def _sharded(self, folder: str) -> nn.Module:
        model, files = open_model(storage.fetch(folder), self.dtype)
        return LiveTeacher(model, shard=True, device=device(), weights=files).model
