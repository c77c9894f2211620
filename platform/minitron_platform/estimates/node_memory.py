"""Main memory of a node whose GPUs a stage computes on: what it needs by part, and the refusal of what no node has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import NamedTuple

from minitron.architecture import Architecture
from minitron.distill.config import ADAMW, ADAMW_8BIT, ADAMW_OFFLOAD
from minitron.distill.loading import FREE_SHARE
from minitron.distill.teacher.shard_writing import default_shard_bytes
from minitron.errors import InputError
from minitron.host_memory import (
    HostMemory,
    file_bytes,
    storing_host_memory,
    training_host_memory,
)
from minitron.memory import FLOAT
from minitron_platform.estimates.gpu import (
    Change,
    GpuTraining,
    gigabytes,
    on_whole_gpus,
    on_workers,
    with_settings,
)
from minitron_platform.estimates.memory import DRIVER_BYTES
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.recipes.schema import Recipe


@dataclass(frozen=True)
class NodeMemory:
    """Peak main memory of a node during a stage. The files that it has read are in the page cache, which gives way to anything
    else, and are not counted."""

    processes: int
    """Most processes of the stage on a node."""
    each: HostMemory
    """Memory of one process."""
    file: int = 0
    """What the first process needs besides: a checkpoint's file that is written, or a model that is converted."""

    @property
    def total(self) -> int:
        """Bytes of all processes, and of the run's own process and Ray's, which may be on the same node."""
        return self.processes * self.each.total + self.file + DRIVER_BYTES

    def __str__(self) -> str:
        """For example "74.1 GB: 8 processes of 8.8 (checkpoint 6.2, context 2.0), file 2.5, Ray and driver 1.2"."""
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in self.each.parts.items() if size >= 5e7)
        count = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        file = f"file {self.file / 1e9:.1f}, " if self.file >= 5e7 else ""
        each = f"{count} of {self.each.total / 1e9:.1f} ({parts})"
        return f"{gigabytes(self.total)}: {each}, {file}Ray and driver {DRIVER_BYTES / 1e9:.1f}"


class GpuNode(NamedTuple):
    """A node with GPUs."""

    gpus: int
    memory: int
    """Bytes of main memory."""


@dataclass(frozen=True)
class NodeWork:
    """What a stage does on the nodes with GPUs."""

    share: float
    """GPUs of each process."""
    processes: int
    """Processes of the stage, on all nodes."""
    each: HostMemory
    file: int = 0
    training: GpuTraining | None = None
    """The training, if the stage is one; it decides `each`."""
    trials: int = 1
    """Number of such trainings at the same time, at most."""

    def on(self, gpus: int) -> NodeMemory:
        """The memory of a node with this number of GPUs."""
        return NodeMemory(max(1, min(self.processes, self._room(gpus))), self.each, self.file)

    def fits_on(self, nodes: Sequence[GpuNode]) -> bool:
        """Whether one of `nodes` has the memory for it, and all together for the processes that at least run at once; also if
        none is known. A single node stands for any number of such nodes."""
        return not nodes or not self._small(nodes) or (self._any_fits(nodes) and self._held(nodes) >= self._together)

    def check(self, stage: str, nodes: Sequence[GpuNode]) -> None:
        """Raise InputError if the stage does not fit on `nodes`; the remedy names the nearest settings that do. `stage` is the
        stage's name for the message."""
        if self.fits_on(nodes):
            return
        small = self._small(nodes)
        if self._any_fits(nodes):
            room = f"so that there is room for {self._held(nodes)} of {self._together} processes"
            raise InputError(f"{self._lack(stage, nodes)}, {room}", self._remedy(small))
        node = min(small, key=self._missing)
        problem = f"{stage}: a node needs {self.on(node.gpus)} of main memory, and has {gigabytes(node.memory)}"
        raise InputError(problem, self._remedy([node]))

    def warning(self, stage: str, nodes: Sequence[GpuNode]) -> str | None:
        """A warning about a stage that fits on `nodes`, but not on each of them: Ray does not know the main memory that
        processes on GPUs need. None if it fits on each. stage: as above."""
        if not (small := self._small(nodes)):
            return None
        return f"{self._lack(stage, nodes)}, and Ray may place processes there; {self._remedy(small)}"

    def _room(self, gpus: int) -> int:
        """Number of processes that this number of GPUs of a node have room for."""
        return gpus * int(1 / self.share + 1e-9) if self.share < 1 else int(gpus / self.share)

    @property
    def _together(self) -> int:
        """Processes that run at the same time or not at all: those of one trial, or all."""
        return self.processes // self.trials

    def _usable(self, nodes: Sequence[GpuNode]) -> list[GpuNode]:
        """Nodes that a process has room on."""
        return [node for node in nodes if self._room(node.gpus)] or list(nodes)

    def _missing(self, node: GpuNode) -> int:
        return self.on(node.gpus).total - node.memory

    def _small(self, nodes: Sequence[GpuNode]) -> list[GpuNode]:
        """Nodes without the memory for as many processes as their GPUs have room for."""
        return [node for node in self._usable(nodes) if self._missing(node) > 0]

    def _any_fits(self, nodes: Sequence[GpuNode]) -> bool:
        return len(self._small(nodes)) < len(self._usable(nodes))

    def _held(self, nodes: Sequence[GpuNode]) -> int:
        """Number of processes that `nodes` have GPUs and main memory for."""
        return sum(
            min(self._room(node.gpus), max(0, node.memory - DRIVER_BYTES) // max(1, self.each.total)) for node in nodes
        )

    def _lack(self, stage: str, nodes: Sequence[GpuNode]) -> str:
        """What the smallest of `nodes` lacks, if others have enough."""
        small = self._small(nodes)
        node = max(small, key=self._missing)
        have = "has" if len(small) == 1 else "have"
        count = f"{len(small)} of {len(self._usable(nodes))} nodes {have} less ({gigabytes(node.memory)})"
        return f"{stage}: a node needs {self.on(node.gpus)} of main memory, {count}"

    def _remedy(self, nodes: Sequence[GpuNode]) -> str:
        """The nearest settings that fit on each of `nodes`, as a remedy."""
        nearest = _nearest(self.training, self.trials, nodes) if self.training else None
        if nearest is None:
            return "use nodes with more main memory, or with fewer GPUs each"
        changes, total = nearest
        return f"set {' and '.join(changes)}, which takes {gigabytes(total)}, or use nodes with more main memory"


def training_work(training: GpuTraining | None, trials: int = 1) -> NodeWork | None:
    """A training on GPUs, with the settings that their memory allows; None on CPUs. trials: number of such trainings at the
    same time, if there is room for them."""
    if training is None:
        return None
    fit = training.fit()
    each = training_host_memory(
        training.student,
        fit.config,
        training.seq_length,
        teacher=training.teacher,
        stored=fit.teacher_kept == "head",
        processes=training.processes,
        node_processes=training.node_processes,
        gpu_bytes=training.gpu_bytes,
        value_bytes=training.value_bytes,
        trained=training.trained,
        saved=training.pauses or bool(fit.config.checkpoint_every),
    )
    file = file_bytes(training.student, training.value_bytes)
    return NodeWork(training.gpus, trials * training.processes, each, file, training, trials)


def trains_on(nodes: Sequence[GpuNode], trials: int, training: GpuTraining) -> bool:
    """Whether `nodes` have the main memory for a training, `trials` of which run at once."""
    work = training_work(training, trials)
    return work is None or work.fits_on(nodes)


def forward_work(models: Sequence[Architecture], value_bytes: int, resources: ResolvedResources) -> NodeWork | None:
    """Forward passes of `models`, which all workers load; None without GPUs."""
    if not resources.gpus_per_worker:
        return None
    reading = value_bytes * max(model.largest_tensor for model in models)
    return NodeWork(resources.gpus_per_worker, resources.workers, HostMemory(reading=reading))


def targets_work(teacher: Architecture, value_bytes: int, stored: int, resources: ResolvedResources) -> NodeWork | None:
    """The teacher's forward pass over all rows, whose outputs take `stored` bytes; None without GPUs."""
    if not resources.gpus_per_worker:
        return None
    workers = resources.workers
    room = FREE_SHARE * min(1.0, resources.gpus_per_worker) * resources.gpu_memory_bytes
    each = storing_host_memory(
        teacher,
        value_bytes,
        min(stored, default_shard_bytes(stored, workers)),
        processes=workers,
        split=workers > 1 and teacher.num_parameters * value_bytes > room,
    )
    return NodeWork(resources.gpus_per_worker, workers, each)


def conversion_work(
    recipe: Recipe, teacher: Architecture, value_bytes: int, resources: ResolvedResources
) -> NodeWork | None:
    """The teacher's conversion by the first worker, which has the model in main memory if the source has another dtype, and of
    a GGUF file in float32 before; None without GPUs."""
    if not resources.gpus_per_worker:
        return None
    size = value_bytes + (FLOAT if recipe.teacher.model.endswith(".gguf") else 0)
    return NodeWork(resources.gpus_per_worker, resources.workers, HostMemory(), file=size * teacher.num_parameters)


def _nearest(training: GpuTraining, trials: int, nodes: Sequence[GpuNode]) -> tuple[list[str], int] | None:
    """The smallest number of changes of the recipe with which the training fits on its GPUs and on each of `nodes`, and the
    bytes of a node then; None if nothing is enough."""
    changes = list(_changes(training))
    for count in range(1, 4):
        for some in combinations(changes, count):
            if len({name.partition("=")[0] for name, _ in some}) < count:
                continue
            changed = training
            for _, change in some:
                changed = change(changed)
            work = training_work(changed, trials)
            assert work is not None
            totals = [work.on(node.gpus).total for node in nodes]
            if all(total <= node.memory for total, node in zip(totals, nodes, strict=True)) and changed.fit().fits:
                return [name for name, _ in some], max(totals)
    return None


def _changes(training: GpuTraining) -> Iterator[Change]:
    """Changes that take less main memory of a node; the one that costs least comes first."""
    config, key = training.config, training.key
    if training.share < 1:
        yield f"{training.share_key}=1", on_whole_gpus
    several = training.processes > 1
    if config.optimizer == ADAMW_OFFLOAD:
        yield f"{key}.optimizer={ADAMW}", partial(with_settings, optimizer=ADAMW)
        if several and "shard" not in training.chosen:
            yield f"{key}.optimizer={ADAMW} and {key}.shard=true", partial(with_settings, optimizer=ADAMW, shard=True)
        yield f"{key}.optimizer={ADAMW_8BIT}", partial(with_settings, optimizer=ADAMW_8BIT)
    workers = training.processes // 2
    while workers:
        yield f"{training.workers_key}={workers}", partial(on_workers, workers)
        workers //= 2
    if config.checkpoint_every and not training.pauses:
        yield f"{key}.checkpoint_every=0", partial(with_settings, checkpoint_every=0)
