"""The resources that a recipe's processes need, and whether this machine or the connected cluster has them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import torch

from minitron.architecture import Architecture
from minitron.device import compute_dtype, cores, gpu_bytes
from minitron.errors import InputError
from minitron_platform.amounts import counted
from minitron_platform.estimates.gpu import are_trials_small
from minitron_platform.program_output import program_output
from minitron_platform.recipes.resources import NODE_GPUS, ResolvedResources, resolve, with_room_on
from minitron_platform.recipes.schema import Recipe
from minitron_search.nodes import Node, gpus_of, possible_nodes
from minitron_search.placement import max_concurrent_trials

ANSWER_SECONDS = 30  # longest wait for nodes to report their devices
Result = TypeVar("Result")


def joins_cluster(address: str | None) -> bool:
    """Whether a run with this `--address` joins a running Ray cluster instead of starting a private Ray."""
    return (address or os.environ.get("RAY_ADDRESS") or "local") != "local"


def resources_here(recipe: Recipe, teacher: Architecture, value_bytes: int) -> ResolvedResources:
    """The recipe's resources on this machine. value_bytes: bytes per weight in the dtype that models compute in."""
    gpus = torch.cuda.device_count()
    size = gpu_bytes()
    small = gpus > 0 and are_trials_small(recipe, teacher, value_bytes, size)
    resources = resolve(recipe, gpus, gpu_memory_bytes=size, small_trials=small, gpus_per_node=gpus or NODE_GPUS)
    return with_room_on(resources, [private_node(resources)])  # this machine does not grow


def resources_of_cluster(recipe: Recipe) -> ResolvedResources:
    """The recipe's resources on the connected cluster, with the nodes that its autoscaler may start. Trials do not share a
    GPU unless the recipe says so."""
    nodes = cluster_nodes()
    return resolve_on(recipe, nodes, gpu_memory_bytes=_cluster_gpu_bytes() if gpus_of(nodes) else 0)


def resolve_on(recipe: Recipe, nodes: Sequence[Node], *, gpu_memory_bytes: int = 0) -> ResolvedResources:
    """The recipe's resources on a cluster of these nodes; of `workers: auto`, no more than have room on them."""
    largest = max((gpus_of([node]) for node in nodes), default=0)
    resources = resolve(recipe, gpus_of(nodes), gpu_memory_bytes=gpu_memory_bytes, gpus_per_node=largest or NODE_GPUS)
    if recipe.resources.workers != "auto":
        return resources
    room = max_concurrent_trials(nodes, resources.worker_share)
    return replace(resources, workers=max(1, min(resources.workers, room)))


def _cluster_gpu_bytes() -> int:
    """Memory of the smallest GPU of the connected cluster in bytes, from nvidia-smi on each node; 0 if no node answers."""
    return min(filter(None, _on_nodes(node_gpu_bytes, "GPU")), default=0)


def cluster_cpu_dtype() -> torch.dtype:
    """The dtype that suits the CPUs of all nodes of the connected cluster that offer CPUs."""
    dtypes = set(_on_nodes(compute_dtype, "CPU"))
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32


def _on_nodes(function: Callable[[], Result], resource: str) -> list[Result]:
    """What `function` returns on every node of the connected cluster that has `resource`, without those that do not answer."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(resource)]
    remote = ray.remote(num_cpus=0)(function)
    tasks = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes
    ]
    answered, _ = ray.wait(tasks, num_returns=len(tasks), timeout=ANSWER_SECONDS) if tasks else ([], [])
    results = []
    for task in answered:
        with suppress(RayError):  # a node that has died
            results.append(ray.get(task))
    return results


def node_gpu_bytes() -> int:
    """Memory of the smallest GPU of this node, or part of one (MIG), in bytes, without a CUDA context on it; 0 without
    nvidia-smi."""
    whole = _nvidia_smi("--query-gpu=memory.total", "--format=csv,noheader,nounits")  # MiB
    sizes = [int(line) << 20 for line in whole.split() if line.isdigit()]
    sizes += [int(size) * 10**9 for size in re.findall(r"^ +MIG .*?(\d+)gb", _nvidia_smi("-L"), re.MULTILINE)]
    return min(sizes, default=0)


def _nvidia_smi(*arguments: str) -> str:
    return program_output("nvidia-smi", *arguments, seconds=ANSWER_SECONDS / 3)


def cluster_nodes() -> list[Node]:
    """Resources of the connected cluster's nodes, with those that its autoscaler may start."""
    return possible_nodes()


def private_node(resources: ResolvedResources) -> Node:
    """Resources of a private Ray on this machine: all GPUs, and a CPU slot per core, or more if one trial or all training
    workers together need more."""
    trial_cpus = resources.workers_per_trial * resources.cpus_per_trial
    worker_cpus = resources.workers * resources.cpus_per_worker
    cpus = max(cores(), math.ceil(max(trial_cpus, worker_cpus)))
    return {"CPU": cpus, "GPU": torch.cuda.device_count()}


def trials_at_once(resources: ResolvedResources, nodes: Sequence[Node]) -> int:
    """Number of trials that the nodes have CPU and GPU slots for; the main memory may allow fewer."""
    return max_concurrent_trials(
        nodes, resources.trial_share, resources.workers_per_trial, resources.least_workers_per_trial
    )


def room_text(resources: ResolvedResources, nodes: Sequence[Node]) -> str:
    """For example "1 GPU: 1 worker with 1 GPU, up to 4 trials at once with 0.25 GPU each"."""
    gpus = gpus_of(nodes)
    num_trials = trials_at_once(resources, nodes)
    available = counted(gpus, "GPU") if gpus else "no GPU"
    fewest_workers = resources.least_workers or resources.workers
    workers = f"{fewest_workers} to " if fewest_workers < resources.workers else ""
    workers += counted(resources.workers, "worker")
    trials = counted(num_trials, "trial")
    least = resources.least_workers_per_trial
    fewest = f"{least} to " if least and least < resources.workers_per_trial else ""
    per_trial = f" of {fewest}{resources.workers_per_trial} workers" if resources.workers_per_trial > 1 else ""
    return (
        f"{available}: {workers} with {_share_text(resources.worker_share, resources.workers)}, "
        f"up to {trials} at once{per_trial} "
        f"with {_share_text(resources.trial_share, num_trials * resources.workers_per_trial)}"
    )


def _share_text(share: Node, processes: int) -> str:
    """For example "0.25 GPU each"; `share` is what each process takes."""
    unit = "GPU" if "GPU" in share else "CPU"
    return counted(share[unit], unit) + (" each" if processes > 1 else "")


def starting_text(possible: Sequence[Node], present: Sequence[Node]) -> str:
    """For example "; 16 of the 64 GPUs are there now", if the autoscaler has to start nodes; empty otherwise."""
    unit = "GPU" if gpus_of(possible) else "CPU"
    most, now = (sum(int(node.get(unit, 0)) for node in nodes) for nodes in (possible, present))
    return f"; {now} of the {most} {unit}s are there now, the autoscaler may start the others" if now < most else ""


def checked_resources(recipe: Recipe, nodes: Sequence[Node]) -> ResolvedResources:
    """The recipe's resources on a cluster of these nodes. Raises what `check_nodes` raises."""
    resources = resolve_on(recipe, nodes)
    check_nodes(resources, nodes)
    return resources


def check_cluster(resources: ResolvedResources) -> None:
    """Raise what `check_nodes` raises for the connected cluster."""
    check_nodes(resources, cluster_nodes())


def check_nodes(resources: ResolvedResources, nodes: Sequence[Node]) -> None:
    """Raise InputError if a cluster of these nodes is too small for a trial or the workers; Ray would wait forever instead."""
    cpus, gpus = (sum(node.get(unit, 0) for node in nodes) for unit in ("CPU", "GPU"))
    for key, count_key, count, share in (
        (
            "trial",
            "workers_per_trial",
            resources.least_workers_per_trial or resources.workers_per_trial,
            resources.trial_share,
        ),
        ("worker", "workers", resources.least_workers or resources.workers, resources.worker_share),
    ):
        each_cpus = share["CPU"]
        each_gpus = share.get("GPU", 0)
        room = max_concurrent_trials(nodes, share)
        if not room:
            raise InputError(
                f"resources: a {key} needs {each_cpus:g} CPUs and {each_gpus:g} GPUs, and no node of the cluster has that many",
                f"lower resources.cpus_per_{key} or resources.gpus_per_{key}, or use larger nodes",
            )
        if room < count:
            apart = "" if count * each_cpus > cpus or count * each_gpus > gpus else f", on nodes with room for {room}"
            raise InputError(
                f"resources.{count_key}: {count} need {count * each_cpus:g} CPUs and {count * each_gpus:g} GPUs together, "
                f"and the cluster has {cpus:g} and {gpus:g}{apart}",
                f"lower resources.{count_key}, or the CPUs and GPUs of each, or use a larger cluster",
            )
