"""Room for a recipe's processes on Ray: what they take of a private Ray or a cluster, and what that must have."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress

import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minitron.architecture import Architecture
from minitron.device import gpu_bytes
from minitron.errors import InputError
from minitron_platform.cluster.ray_session import cluster_cpus_gpus, cores
from minitron_platform.estimates.gpu import are_trials_small
from minitron_platform.recipes.resources import ResolvedResources, resolve
from minitron_platform.recipes.schema import Recipe
from minitron_search.placement import max_concurrent_trials

ANSWER_SECONDS = 30  # that a node has to say how much memory its GPUs have
Node = dict[str, float]  # amounts by Ray's names


def joins_cluster(address: str | None) -> bool:
    """Whether a run with this `--address` uses a Ray that is there already, not a private one on this machine."""
    return (address or os.environ.get("RAY_ADDRESS") or "local") != "local"


def resources_here(recipe: Recipe, teacher: Architecture, value_bytes: int) -> ResolvedResources:
    """What a run takes of this machine; `value_bytes` of a weight in the dtype that models compute in."""
    gpus, size = torch.cuda.device_count(), gpu_bytes()
    small = gpus > 0 and are_trials_small(recipe, teacher, value_bytes, size)
    return resolve(recipe, gpus, gpu_memory_bytes=size, small_trials=small)


def resources_of_cluster(recipe: Recipe) -> ResolvedResources:
    """Resources of a run on the connected cluster. Trials share no GPU unless the recipe says so."""
    gpus = sum(int(node.get("GPU", 0)) for node in cluster_nodes())
    return resolve(recipe, gpus, gpu_memory_bytes=_cluster_gpu_bytes() if gpus else 0)


def _cluster_gpu_bytes() -> int:
    """Memory of the smallest GPU of the connected cluster, which each node's nvidia-smi is asked for; 0 if none answers."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    ask = ray.remote(num_cpus=0)(_node_gpu_bytes)
    tasks = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes
    ]
    answered, _ = ray.wait(tasks, num_returns=len(tasks), timeout=ANSWER_SECONDS)
    sizes: list[int] = []
    for task in answered:
        with suppress(RayError):  # a node that has gone has no GPU to count
            sizes.append(ray.get(task))
    return min(filter(None, sizes), default=0)


def _node_gpu_bytes() -> int:
    """Memory of the smallest GPU of the node, without a context on it; 0 without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]  # MiB
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return min((int(line) << 20 for line in asked.stdout.split() if line.isdigit()), default=0)


def cluster_nodes() -> list[Node]:
    """The living nodes of the connected cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def private_node(resources: ResolvedResources) -> Node:
    """What a private Ray on this machine offers: every GPU, and a CPU slot per core but at least enough for one trial and for
    all training workers."""
    trial = resources.workers_per_trial * resources.cpus_per_trial
    cpus = max(cores(), math.ceil(max(trial, resources.workers * resources.cpus_per_worker)))
    return {"CPU": cpus, "GPU": torch.cuda.device_count()}


def trials_at_once(resources: ResolvedResources, nodes: Sequence[Node]) -> int:
    """As many as there are slots for; main memory may have room for fewer."""
    return max_concurrent_trials(nodes, resources.trial_share, resources.workers_per_trial)


def room_text(resources: ResolvedResources, nodes: Sequence[Node]) -> str:
    """As in "1 GPU: 1 worker with 1 GPU, up to 4 trials at once with 0.25 GPU each"."""
    gpus, trials = sum(int(node.get("GPU", 0)) for node in nodes), trials_at_once(resources, nodes)
    there = counted(gpus, "GPU") if gpus else "no GPU"
    workers, processes = counted(resources.workers, "worker"), counted(trials, "trial")
    several = f" of {resources.workers_per_trial} workers" if resources.workers_per_trial > 1 else ""
    return (
        f"{there}: {workers} with {_taken(resources.worker_share, resources.workers)}, up to {processes} at once{several} "
        f"with {_taken(resources.trial_share, trials * resources.workers_per_trial)}"
    )


def _taken(share: Node, processes: int) -> str:
    unit = "GPU" if "GPU" in share else "CPU"
    return counted(share[unit], unit) + (" each" if processes > 1 else "")


def counted(amount: float, unit: str) -> str:
    """As in "2 workers"."""
    return f"{amount:g} {unit}{'s' if amount > 1 else ''}"


def check_cluster(resources: ResolvedResources) -> None:
    """Raise InputError for what the connected cluster has no room for; Ray would wait for it for ever."""
    nodes = cluster_nodes()
    cpus, gpus = cluster_cpus_gpus()
    for key, count_key, count, share in (
        ("trial", "workers_per_trial", resources.workers_per_trial, resources.trial_share),
        ("worker", "workers", resources.workers, resources.worker_share),
    ):
        each_cpus, each_gpus = share["CPU"], share.get("GPU", 0)
        if not max_concurrent_trials(nodes, share):
            raise InputError(
                f"resources: a {key} takes {each_cpus:g} CPUs and {each_gpus:g} GPUs, and no node of the cluster has as many",
                f"lower resources.cpus_per_{key} or resources.gpus_per_{key}",
            )
        if not max_concurrent_trials(nodes, share, count):
            raise InputError(
                f"resources.{count_key}: {count} take {count * each_cpus:g} CPUs and {count * each_gpus:g} GPUs at once, "
                f"the cluster has {cpus:g} and {gpus:g}",
                f"lower resources.{count_key} or what each takes, or use a larger cluster",
            )
