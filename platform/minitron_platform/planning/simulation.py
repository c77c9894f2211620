"""A simulation of the stages of a run on a cluster: how long each takes, how long its GPUs compute, and what bounds it.

It runs no model and needs no GPU. Stages follow one another, as in a run; the trials of a search are placed one by one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import singledispatch

from minitron_platform.amounts import counted
from minitron_platform.cluster.room import trials_at_once
from minitron_platform.estimates.work import Alone, DataParallel, Part, Split, Trials
from minitron_platform.planning.cluster import (
    BETWEEN_BYTES,
    INSIDE_BYTES,
    STORAGE_BYTES,
    TRIAL_START,
    Cluster,
)
from minitron_platform.recipes.resources import ResolvedResources, processes_on

COMPUTE = "GPU compute"


@dataclass(frozen=True)
class StageTime:
    """How a stage, or a part of one, uses the cluster."""

    seconds: float
    busy: float
    """GPU-seconds of computing, at the speed that the cluster's GPUs reach."""
    bound: str
    """What takes the longest, in a few words."""


@dataclass(frozen=True)
class _Room:
    """The cluster and the workers in it."""

    cluster: Cluster
    resources: ResolvedResources

    @property
    def workers(self) -> int:
        return self.resources.workers

    @property
    def worker_flops(self) -> float:
        """FLOP/s of a worker."""
        return self.cluster.gpu_flops * min(1.0, self.resources.gpus_per_worker or 1.0)

    @property
    def worker_nodes(self) -> int:
        """Number of nodes that have workers, which fill one node after another."""
        on_each = processes_on(self.cluster.gpus_per_node, self.resources.gpus_per_worker)
        return min(self.cluster.nodes, math.ceil(self.workers / on_each))


def simulate(parts: Sequence[Part], start_up: float, cluster: Cluster, resources: ResolvedResources) -> StageTime:
    """Time of a stage that consists of `parts`, one after another, and `start_up` seconds."""
    room = _Room(cluster, resources)
    times = [StageTime(start_up, 0.0, "start-up"), *(_time(part, room) for part in parts)]
    longest: dict[str, float] = {}
    for time in times:
        longest[time.bound] = longest.get(time.bound, 0.0) + time.seconds
    bound = max(longest, key=lambda name: longest[name])
    return StageTime(sum(time.seconds for time in times), sum(time.busy for time in times), bound)


@singledispatch
def _time(part: Part, room: _Room) -> StageTime:
    raise NotImplementedError(type(part).__name__)


@_time.register
def _alone(part: Alone, room: _Room) -> StageTime:
    longest = {
        "one worker": part.flops / room.worker_flops,
        "one CPU": part.cpu_seconds,
        "storage, one worker": (part.reads_per_node + part.reads + part.writes) / STORAGE_BYTES,
    }
    return StageTime(sum(longest.values()), _busy(part, room), _longest(longest)[1])


@_time.register
def _split(part: Split, room: _Room) -> StageTime:
    useful = min(room.workers, part.items)
    most = math.ceil(part.items / useful)  # items of the worker that has the most
    computing = part.flops / part.items * most / room.worker_flops
    on_cpus = part.cpu_seconds / part.items * most
    loading = part.reads_per_node / STORAGE_BYTES
    transfer = (part.reads + part.writes) / (STORAGE_BYTES * room.worker_nodes)
    compute_bound = _compute_bound(part.items, room, "rows or documents")
    work, bound = _longest({compute_bound: computing, "CPUs": on_cpus, "storage": transfer})
    return StageTime(loading + work, _busy(part, room), "storage" if loading > work else bound)


@_time.register
def _data_parallel(part: DataParallel, room: _Room) -> StageTime:
    useful = min(room.workers, part.batch_rows)
    rows = math.ceil(part.batch_rows / useful)  # of the worker that has the most
    computing = part.flops / (part.steps * part.batch_rows) * rows / room.worker_flops
    network = max(part.inside_bytes / INSIDE_BYTES, part.between_bytes / BETWEEN_BYTES)
    transfer = (part.reads + part.writes) / (STORAGE_BYTES * room.worker_nodes) / part.steps
    compute_bound = _compute_bound(part.batch_rows, room, "rows in a step")
    step, bound = _longest({compute_bound: computing, "network between GPUs": network, "storage": transfer})
    loading = part.reads_per_node / STORAGE_BYTES
    return StageTime(loading + part.steps * step, _busy(part, room), bound)


@_time.register
def _trials(part: Trials, room: _Room) -> StageTime:
    """Trials start in their order, each as soon as there is room."""
    cluster = room.cluster
    resources = replace(
        room.resources, workers_per_trial=part.workers, least_workers_per_trial=None, gpus_per_trial=part.gpus
    )
    at_once = trials_at_once(resources, cluster.node_list)
    count = len(part.shares)
    speed = cluster.gpu_flops * min(1.0, part.gpus) * part.workers * part.balance
    bytes_per_second = STORAGE_BYTES * cluster.nodes / min(at_once, count)
    computing = [part.flops * share / speed for share in part.shares]
    transfer = [(part.reads + part.writes) * share / bytes_per_second for share in part.shares]
    durations = [TRIAL_START + max(pair) for pair in zip(computing, transfer, strict=True)]
    free_at = [0.0] * min(at_once, count)  # when each place is free again; a heap
    for duration in durations:
        heapq.heapreplace(free_at, free_at[0] + duration)
    seconds = max(free_at)
    if seconds > 1.2 * sum(durations) / at_once:
        bound = f"{count} candidate{'s' if count > 1 else ''}, room for {at_once} at once"
    elif TRIAL_START * count > max(sum(computing), sum(transfer)):
        bound = "start of trials"
    else:
        bound = "storage" if sum(transfer) > sum(computing) else COMPUTE
    return StageTime(part.reads_per_node / STORAGE_BYTES + seconds, _busy(part, room), bound)


def _compute_bound(items: int, room: _Room, what: str) -> str:
    """What keeps computing from being faster."""
    if min(items, room.workers) >= room.cluster.gpus:
        return COMPUTE
    return f"{items:,} {what}" if items <= room.workers else counted(room.workers, "worker")


def _busy(part: Part, room: _Room) -> float:
    return part.flops / room.cluster.gpu_flops


def _longest(seconds: dict[str, float]) -> tuple[float, str]:
    """The longest of things that are done at the same time: its seconds and its name."""
    bound = max(seconds, key=lambda name: seconds[name])
    return seconds[bound], bound
