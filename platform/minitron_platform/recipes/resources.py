"""The recipe's `resources` with a number for every `auto`, chosen by the available GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from minitron_platform.amounts import counted
from minitron_platform.recipes.schema import Recipe, WorkerRange
from minitron_search.nodes import gpus_of
from minitron_search.placement import max_concurrent_trials

TRIALS_PER_GPU = 4  # of small candidates; a single one leaves the GPU idle half of the time
CPU_WORKERS = 2  # training workers on a machine without a GPU
NODE_GPUS = 8  # assumed per node before the cluster is known
GPU_MEMORY_BYTES = 80_000_000_000  # assumed if a GPU's memory is unknown; that of an H100


@dataclass(frozen=True)
class ResolvedResources:
    """The recipe's `resources` with a number for every `auto`; the fields are the recipe's keys."""

    workers_per_trial: int
    cpus_per_trial: float
    gpus_per_trial: float
    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    max_failures: int
    least_workers: int | None = None
    """Smallest number of workers that go on after a loss; None if the number does not change."""
    least_workers_per_trial: int | None = None
    """The same of a trial."""
    gpu_memory_bytes: int = GPU_MEMORY_BYTES
    gpus_per_node: int = NODE_GPUS

    @property
    def uses_gpus(self) -> bool:
        """Whether trials or training workers run on GPUs."""
        return self.gpus_per_trial > 0 or self.gpus_per_worker > 0

    @property
    def trial_share(self) -> dict[str, float]:
        """Resources of each worker of a trial, by Ray's names."""
        return _share(self.cpus_per_trial, self.gpus_per_trial)

    @property
    def worker_share(self) -> dict[str, float]:
        """Resources of each worker of the full distillation, by Ray's names."""
        return _share(self.cpus_per_worker, self.gpus_per_worker)


def resolve(
    recipe: Recipe,
    gpus: int,
    *,
    gpu_memory_bytes: int = 0,
    small_trials: bool = False,
    gpus_per_node: int = NODE_GPUS,
) -> ResolvedResources:
    """The resources of `recipe` on a machine or cluster with `gpus` GPUs of `gpu_memory_bytes`, 0 if that is not known;
    numbers that the recipe gives are kept.

    With GPUs, each training worker and each worker of a trial has one; if `small_trials`, a GPU's memory fits
    TRIALS_PER_GPU trials, and single-worker trials share it. Without GPUs they have CPUs only. So do workers that train
    together and outnumber the GPUs, because NCCL does not let processes share a GPU. There are no more training workers
    than rows in a step.
    """
    given = recipe.resources
    workers, least_workers = _range(_auto_workers(recipe, gpus) if given.workers == "auto" else given.workers)
    workers_per_trial, least_per_trial = _range(given.workers_per_trial)
    gpus_per_worker = given.gpus_per_worker
    if gpus_per_worker == "auto":
        gpus_per_worker = 1 if (least_workers or workers) <= gpus else 0
    gpus_per_trial = given.gpus_per_trial
    if gpus_per_trial == "auto" and (least_per_trial or workers_per_trial) > gpus:
        gpus_per_trial = 0
    elif gpus_per_trial == "auto":
        gpus_per_trial = 1 / TRIALS_PER_GPU if small_trials and workers_per_trial == 1 else 1
    return ResolvedResources(
        workers_per_trial=workers_per_trial,
        cpus_per_trial=given.cpus_per_trial,
        gpus_per_trial=gpus_per_trial,
        workers=workers,
        cpus_per_worker=given.cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
        max_failures=given.max_failures,
        least_workers=least_workers,
        least_workers_per_trial=least_per_trial,
        gpus_per_node=gpus_per_node,
        gpu_memory_bytes=int(
            (gpu_memory_bytes or GPU_MEMORY_BYTES) if given.gpu_memory_bytes == "auto" else given.gpu_memory_bytes
        ),
    )


def _range(workers: int | WorkerRange) -> tuple[int, int | None]:
    """The largest number of workers, and the smallest if it is another key of the recipe."""
    return (workers.max, workers.min) if isinstance(workers, WorkerRange) else (workers, None)


def with_room_on(resources: ResolvedResources, nodes: Sequence[Mapping[str, float]]) -> ResolvedResources:
    """`resources` with as many workers of each range as `nodes`, by Ray's resource names, have room for."""

    def fitting(most: int, least: int | None, share: Mapping[str, float]) -> int:
        return max(least, min(most, max_concurrent_trials(nodes, share))) if least else most

    return replace(
        resources,
        workers=fitting(resources.workers, resources.least_workers, resources.worker_share),
        workers_per_trial=fitting(
            resources.workers_per_trial, resources.least_workers_per_trial, resources.trial_share
        ),
    )


def _auto_workers(recipe: Recipe, gpus: int) -> int:
    """Number of training workers if the recipe leaves it open."""
    gpus_per_worker = recipe.resources.gpus_per_worker
    max_workers = smallest_batch(recipe)
    if not gpus or gpus_per_worker == 0:
        return min(CPU_WORKERS, max_workers)
    if gpus_per_worker == "auto":
        return min(gpus, max_workers)
    if gpus_per_worker < 1:
        return 1  # several would share a GPU
    return min(max(1, int(gpus / gpus_per_worker)), max_workers)


def gpu_warnings(
    recipe: Recipe, resources: ResolvedResources, nodes: Sequence[Mapping[str, float]], dtype: torch.dtype
) -> list[str]:
    """Warnings about a machine or cluster of `nodes`, by Ray's resource names, on whose GPUs models compute in `dtype`: workers
    that are left on CPUs because they outnumber the GPUs, GPUs that are idle for lack of CPUs, and float32, which is slow on
    GPUs."""
    gpus = gpus_of(nodes)
    if not gpus:
        return []
    given = recipe.resources
    settings = (
        (
            "workers_per_trial",
            resources.least_workers_per_trial or resources.workers_per_trial,
            given.gpus_per_trial,
            resources.gpus_per_trial,
            "",
        ),
        (
            "workers",
            resources.least_workers or resources.workers,
            given.gpus_per_worker,
            resources.gpus_per_worker,
            ", or leave it out,",
        ),
    )
    warnings = [
        f"resources.{key}: {count} workers cannot share {gpus} GPU{'s' if gpus > 1 else ''}, so they train on CPUs; "
        f"lower it to {gpus}{alternative} to use {'them' if gpus > 1 else 'it'}"
        for key, count, requested_gpus, chosen_gpus, alternative in settings
        if requested_gpus == "auto" and not chosen_gpus
    ]
    warnings += _idle_gpus(recipe, resources, nodes, gpus)
    if dtype == torch.float32 and resources.uses_gpus:
        warnings.append(
            "teacher.dtype: float32 on GPUs takes twice the memory of bfloat16 and many times as long; "
            "leave it at auto unless you need it"
        )
    return warnings


def _idle_gpus(
    recipe: Recipe, resources: ResolvedResources, nodes: Sequence[Mapping[str, float]], gpus: int
) -> Iterator[str]:
    """Warnings about GPUs that no worker or trial is given because the nodes have no CPUs for it."""
    given = recipe.resources.workers
    most = _auto_workers(recipe, gpus) if given == "auto" else _range(given)[0]
    per_trial, least = resources.workers_per_trial, resources.least_workers_per_trial
    for name, where, share, workers, smallest, limit in (
        ("worker", "", resources.worker_share, 1, None, most),
        ("trial", " in the search", resources.trial_share, per_trial, least, math.inf),
    ):
        each = share.get("GPU", 0)
        room = max_concurrent_trials(nodes, share, workers, smallest)
        if not each or not room:
            continue
        by_gpus = max_concurrent_trials(nodes, {"GPU": each}, workers, smallest)
        # of parts of GPUs, Ray fills one GPU before the next
        used, usable = (math.ceil(min(count * workers, limit) * each - 1e-9) for count in (room, by_gpus))
        if used == usable:
            continue
        enough = min(
            node.get("CPU", 0) // count for node in nodes if (count := max_concurrent_trials([node], {"GPU": each}))
        )
        to = f" to {enough:g}" if enough >= 1 else ""
        yield (
            f"resources.cpus_per_{name}: {share['CPU']:g} leaves {counted(usable - used, 'GPU')} idle{where}, since the nodes "
            f"have CPUs for {counted(room, name)}; lower it{to}, or use nodes with more CPUs"
        )


def processes_on(node_gpus: int, gpus_each: float) -> int:
    """Number of processes that train together on a node, with `gpus_each` of its `node_gpus` GPUs each; those with a part of a
    GPU train alone."""
    return max(1, int(node_gpus / max(1.0, gpus_each)))


def idle_workers_warning(recipe: Recipe, resources: ResolvedResources) -> str | None:
    """A warning about workers for which no step of a training has a row; None if there are none."""
    rows = smallest_batch(recipe)
    idle = resources.workers - rows
    if idle <= 0:
        return None
    return (
        f"resources.workers: {resources.workers}, but the smallest batch_rows of a training is {rows}, so that "
        f"{idle} of them train{'s' if idle == 1 else ''} nothing in its steps; lower it to {rows}"
    )


def _share(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


def smallest_batch(recipe: Recipe) -> int:
    """The smallest number of rows in a step of any training that the workers do together."""
    trainings = [recipe.distillation(member) for member in recipe.family]
    if correction := recipe.correction():
        trainings.append(correction)
    return min(training.batch_rows for training in trainings)
