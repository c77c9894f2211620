"""GPU memory of a recipe's trainings: the settings that `auto` chooses by it, and the refusal of what does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

from minitron.architecture import Architecture
from minitron.distill import Losses
from minitron.distill.blocks import ACTIVATION_CHECKPOINTING
from minitron.distill.config import ADAMW, ADAMW_8BIT, ADAMW_OFFLOAD, ON_WHOLE_STUDENTS, DistillConfig
from minitron.distill.fitting import SHARE, Fit, fitting
from minitron.distill.gpu_memory import TeacherKept
from minitron.errors import InputError
from minitron_platform.estimates.memory import corrected_share
from minitron_platform.estimates.teacher import runs_live_teacher
from minitron_platform.recipes.build import auto_settings, distill_config, separates_documents
from minitron_platform.recipes.resources import (
    NODE_GPUS,
    TRIALS_PER_GPU,
    ResolvedResources,
    processes_on,
    resolve,
    smallest_batch,
)
from minitron_platform.recipes.schema import Member, Recipe, Training

MAX_WORKERS = 64  # that a remedy suggests
TEACHER: dict[TeacherKept | None, str] = {"whole": "replicated", "sharded": "sharded"}
KEPT: dict[str, tuple[TeacherKept, ...]] = {
    "auto": ("whole", "sharded"),
    "replicated": ("whole",),
    "sharded": ("sharded",),
}


@dataclass(frozen=True)
class GpuTraining:
    """A training on GPUs."""

    key: str
    """Recipe key of the training."""
    workers_key: str
    """Recipe key of the number of processes."""
    processes: int
    most_processes: int
    """That the rows of a step are enough for."""
    gpus: float
    """GPUs that each process has; it computes on one of them at most."""
    gpu_bytes: int
    """Memory of a GPU."""
    student: Architecture
    config: DistillConfig
    chosen: tuple[str, ...]
    """Fields of `config` that are chosen by memory, because the recipe says `auto`."""
    seq_length: int
    value_bytes: int
    """Bytes of a weight in the compute dtype."""
    teacher: Architecture | None = None
    teacher_kept: tuple[TeacherKept, ...] = ("head",)
    """The parts of the teacher that a GPU may have; one of them is chosen by memory."""
    source: Architecture | None = None
    """The model that a trial prunes its candidate from, on the GPU."""
    source_kept: bool = False
    """Whether it stays there during the training."""
    trained: float = 1.0
    """Share of the parameters that is trained."""
    compared: int = 0
    """Number of outputs within layers that the losses compare."""
    node_gpus: int = NODE_GPUS
    """GPUs of a node."""
    separate_documents: bool = False
    """Whether tokens attend only to their own document of a row."""
    pauses: bool = False
    """Whether its state is saved so that it goes on later, as at a rung, without `checkpoint_every` too."""

    @property
    def share(self) -> float:
        """Share of a GPU's memory that each process has."""
        return min(1.0, self.gpus)

    @property
    def node_processes(self) -> int:
        """Most processes on a node."""
        return processes_on(self.node_gpus, self.gpus)

    @property
    def share_key(self) -> str:
        """Recipe key of `gpus`."""
        return self.workers_key.replace("workers_per_trial", "gpus_per_trial").replace("workers", "gpus_per_worker")

    @property
    def room(self) -> int:
        """GPU memory of a process in bytes."""
        return int(self.share * self.gpu_bytes)

    def fit(self) -> Fit:
        """The settings to train with, whether they fit or not."""
        return fitting(
            self.student,
            self.config,
            self.seq_length,
            int(SHARE * self.room),
            chosen=self.chosen,
            teacher=self.teacher,
            teacher_kept=self.teacher_kept,
            source=self.source,
            source_kept=self.source_kept,
            processes=self.processes,
            node_processes=self.node_processes,
            gpu_bytes=self.gpu_bytes,
            value_bytes=self.value_bytes,
            trained=self.trained,
            compared=self.compared,
            separate_documents=self.separate_documents,
        )

    def check(
        self, stage: str, *, gpus: int | None = None, on_nodes: Callable[[GpuTraining], bool] = lambda training: True
    ) -> Fit:
        """The settings to train with. `stage` is the stage's name for the message.

        Raises InputError if a process needs more memory than it has; the remedy names the nearest settings that fit on the
        `gpus` that there are, None if that is not known, else on more of them. on_nodes: whether a training fits into the
        main memory of the nodes.
        """
        fit = self.fit()
        if fit.memory.peak <= self.room:
            return fit
        need = f"{stage}: needs {fit.memory} of each of {_gpus(self.processes)}, and there are {gigabytes(self.room)}"
        each = max(1, math.ceil(self.gpus))
        nearest = self._nearest(MAX_WORKERS if gpus is None else min(gpus // each, MAX_WORKERS), on_nodes)
        elsewhere = ""
        if nearest is None and gpus is not None and (nearest := self._nearest(MAX_WORKERS, on_nodes)):
            elsewhere = f"with {_gpus(nearest[2].processes * each)}, "
        if nearest is None:
            remedy = "train a smaller student, or use GPUs with more memory or more of them"
        else:
            changes, smaller, _ = nearest
            remedy = (
                f"{elsewhere}set {' and '.join(changes)}, which takes {gigabytes(smaller.memory.peak)}, "
                "or use GPUs with more memory"
            )
        raise InputError(need, remedy)

    def _nearest(self, most: int, on_nodes: Callable[[GpuTraining], bool]) -> tuple[list[str], Fit, GpuTraining] | None:
        """The fewest changes of the recipe, as KEY=VALUE, with which the training fits, and the training with them. It may then
        have up to `most` processes, but has more than now only if nothing else is enough. None if nothing is enough."""
        for workers in self._more_workers(most):
            for count in range(4):
                for some in combinations(self._changes(), count):
                    if sum(".shard=" in name or ".optimizer=" in name for name, _ in some) > 1:
                        continue  # what is offered of the two does not work together
                    changed = self
                    for _, change in (*workers, *some):
                        changed = change(changed)
                    fit = changed.fit()
                    if fit.fits and on_nodes(changed):
                        return [name for name, _ in (*workers, *some)], fit, changed
        return None

    def _more_workers(self, most: int) -> Iterator[list[Change]]:
        yield []
        number = 2
        # processes that train together do not share a GPU
        whole = [] if self.share == 1 else [(f"{self.share_key}=1", on_whole_gpus)]
        while number <= min(most, self.most_processes):
            if number > self.processes:
                yield [(f"{self.workers_key}={number}", partial(on_workers, number)), *whole]
            number *= 2

    def _changes(self) -> list[Change]:
        """Changes of the recipe that take less memory; the one that costs least speed comes first."""
        config, key = self.config, self.key
        changes: list[Change] = []

        def offer(name: str, **values: Any) -> None:
            changes.append((name, partial(with_settings, **values)))

        if config.micro_batch_rows > 1 and "micro_batch_rows" not in self.chosen:
            offer(f"{key}.micro_batch_rows=1", micro_batch_rows=1)
        if self.share < 1:
            changes.append((f"{self.share_key}=1", on_whole_gpus))
        for how in ACTIVATION_CHECKPOINTING[1:]:
            if config.activation_checkpointing != how and "activation_checkpointing" not in self.chosen:
                offer(f"{key}.activation_checkpointing={how}", activation_checkpointing=how)
        if not config.shard and config.optimizer in ON_WHOLE_STUDENTS:
            offer(f"{key}.optimizer={ADAMW} and {key}.shard=true", optimizer=ADAMW, shard=True)
        elif not config.shard and "shard" not in self.chosen:
            offer(f"{key}.shard=true", shard=True)
        if self.teacher_kept == ("whole",):
            changes.append(("targets.teacher=sharded", lambda training: replace(training, teacher_kept=("sharded",))))
        if config.optimizer != ADAMW_OFFLOAD and not config.shard:
            offer(f"{key}.optimizer={ADAMW_OFFLOAD}", optimizer=ADAMW_OFFLOAD)
        if config.optimizer == ADAMW and not config.shard:
            offer(f"{key}.optimizer={ADAMW_8BIT}", optimizer=ADAMW_8BIT)
        return changes


Change = tuple[str, Callable[[GpuTraining], GpuTraining]]
"""A change of the recipe as KEY=VALUE, and the function that applies it to a training."""


def with_settings(training: GpuTraining, **values: Any) -> GpuTraining:
    """`training` with other fields of its config."""
    return replace(training, config=replace(training.config, **values))


def on_workers(number: int, training: GpuTraining) -> GpuTraining:
    return replace(training, processes=number)


def on_whole_gpus(training: GpuTraining) -> GpuTraining:
    return replace(training, gpus=1.0)


def correction_on_gpus(
    recipe: Recipe, teacher: Architecture, value_bytes: int, resources: ResolvedResources
) -> GpuTraining | None:
    """The teacher's correction; None without one, or on CPUs."""
    training = recipe.correction()
    if recipe.correct is None or training is None or not resources.gpus_per_worker:
        return None
    return GpuTraining(
        key=recipe.correction_key,
        student=teacher,
        value_bytes=value_bytes,
        trained=corrected_share(recipe.correct, teacher),
        pauses=recipe.correct.when == "measured",
        **_workers(recipe, resources),
        **_settings(recipe, training),
    )


def distillation_on_gpus(
    recipe: Recipe,
    member: Member,
    teacher: Architecture,
    student: Architecture,
    value_bytes: int,
    resources: ResolvedResources,
    losses: Losses,
) -> GpuTraining | None:
    """The full distillation of `member`; None on CPUs. `losses` decide with the recipe whether the workers load the teacher."""
    if not resources.gpus_per_worker:
        return None
    training = recipe.distillation(member)
    return GpuTraining(
        key=recipe.distillation_key(member),
        student=student,
        value_bytes=value_bytes,
        teacher=teacher,
        teacher_kept=KEPT[recipe.targets.teacher] if runs_live_teacher(losses, recipe.targets.mode) else ("head",),
        compared=len(losses.hidden) + len(losses.attention) + len(losses.mlp_input) + losses.embedding,
        **_workers(recipe, resources),
        **_settings(recipe, training),
    )


def trials_on_gpus(
    recipe: Recipe,
    teacher: Architecture,
    source: Architecture,
    student: Architecture,
    value_bytes: int,
    resources: ResolvedResources,
) -> GpuTraining | None:
    """A trial of the search; None on CPUs. `source` is the model that candidates are pruned from."""
    if not resources.gpus_per_trial:
        return None
    return GpuTraining(
        key="search.training",
        workers_key="resources.workers_per_trial",
        processes=resources.least_workers_per_trial or resources.workers_per_trial,
        most_processes=recipe.search.training.batch_rows,
        gpus=resources.gpus_per_trial,
        gpu_bytes=resources.gpu_memory_bytes,
        node_gpus=resources.gpus_per_node,
        student=student,
        value_bytes=value_bytes,
        teacher=teacher,
        source=source,
        # a worker that has scored candidates goes on with it to their trials; several workers start anew for each trial
        source_kept=recipe.search.forward is not None and resources.workers_per_trial == 1,
        pauses=recipe.search.halving is not None,
        **_settings(recipe, recipe.search.training),
    )


def are_trials_small(recipe: Recipe, teacher: Architecture, value_bytes: int, gpu_bytes: int) -> bool:
    """Whether TRIALS_PER_GPU trials fit into the memory of one GPU, estimated for a candidate as large as the teacher."""
    small = resolve(recipe, 1, gpu_memory_bytes=gpu_bytes, small_trials=True)
    small = replace(small, workers_per_trial=1, least_workers_per_trial=None, gpus_per_trial=1 / TRIALS_PER_GPU)
    training = trials_on_gpus(recipe, teacher, teacher, teacher, value_bytes, small)
    return training is not None and training.fit().fits


def _workers(recipe: Recipe, resources: ResolvedResources) -> dict[str, Any]:
    return {
        "workers_key": "resources.workers",
        "processes": resources.least_workers
        or resources.workers,  # each has the more memory to hold, the fewer there are
        "most_processes": smallest_batch(recipe),
        "gpus": resources.gpus_per_worker,
        "gpu_bytes": resources.gpu_memory_bytes,
        "node_gpus": resources.gpus_per_node,
    }


def _settings(recipe: Recipe, training: Training) -> dict[str, Any]:
    return {
        "config": distill_config(training),
        "chosen": auto_settings(training),
        "seq_length": recipe.data.seq_length,
        "separate_documents": separates_documents(recipe, on_gpus=True),
    }


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"
