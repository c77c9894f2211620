"""Room for a recipe's processes on Ray: what a private Ray is started with, and what a cluster must have."""

from __future__ import annotations

import math
import os

import ray

from minitron.errors import InputError
from minitron_platform.local_ray import cluster_cpus_gpus, cores
from minitron_platform.recipe import Resources
from minitron_search.room import at_once


def joins_cluster(address: str | None) -> bool:
    """Whether a run with this `--address` uses a Ray that is there already, not a private one on this machine."""
    return (address or os.environ.get("RAY_ADDRESS") or "local") != "local"


def private_cpus(resources: Resources) -> int:
    """CPU slots of a private Ray: one per core, and at least enough for one trial and for all training workers."""
    trial = resources.workers_per_trial * resources.cpus_per_trial
    return max(cores(), math.ceil(max(trial, resources.workers * resources.cpus_per_worker)))


def check_cluster(resources: Resources) -> None:
    """Raise InputError for what the connected cluster has no room for; Ray would wait for it for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = cluster_cpus_gpus()
    for key, count_key, count, each_cpus, each_gpus in (
        ("trial", "workers_per_trial", resources.workers_per_trial, resources.cpus_per_trial, resources.gpus_per_trial),
        ("worker", "workers", resources.workers, resources.cpus_per_worker, resources.gpus_per_worker),
    ):
        share = {"CPU": each_cpus} | ({"GPU": each_gpus} if each_gpus else {})
        if not at_once(nodes, share):
            raise InputError(
                f"resources: a {key} takes {each_cpus:g} CPUs and {each_gpus:g} GPUs, and no node of the cluster has as many",
                f"lower resources.cpus_per_{key} or resources.gpus_per_{key}",
            )
        if not at_once(nodes, share, count):
            raise InputError(
                f"resources.{count_key}: {count} take {count * each_cpus:g} CPUs and {count * each_gpus:g} GPUs at once, "
                f"the cluster has {cpus:g} and {gpus:g}",
                f"lower resources.{count_key} or what each takes, or use a larger cluster",
            )
