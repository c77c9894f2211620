"""The machines that a plan is for: this one, those of a cluster that is to be joined, or GPUs that need not be there yet."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from minitron.architecture import Architecture
from minitron.device import compute_dtype
from minitron_platform.cluster.room import (
    joins_cluster,
    private_node,
    resolve_on,
    resources_here,
    room_text,
    starting_text,
    trials_at_once,
)
from minitron_platform.estimates.memory import machine_memory
from minitron_platform.estimates.node_memory import GpuNode
from minitron_platform.estimates.speed import Speed
from minitron_platform.planning.cluster import GPU, Cluster, assumed_cluster, cluster_for, cluster_here
from minitron_platform.recipes.resources import ResolvedResources, gpu_warnings, resolve, with_room_on
from minitron_platform.recipes.schema import Recipe
from minitron_search.nodes import gpus_of, main_memory

if TYPE_CHECKING:
    from minitron_platform.cluster.nodes_at import ClusterNodes


@dataclass(frozen=True)
class Machines:
    """What a run computes on, as far as it is known before the run."""

    assumed: Cluster | None
    """GPUs that the caller of `plan` names."""
    address: str | None
    """The cluster that is to be joined; None without one."""
    nodes: ClusterNodes | None
    """Its nodes; None if it does not tell them to this machine."""

    @property
    def elsewhere(self) -> bool:
        """Whether the run does not compute on this machine."""
        return self.assumed is not None or self.address is not None

    @property
    def joined(self) -> Cluster | None:
        """The GPUs of the cluster that is to be joined, by the data sheet of their model, or of an H100 if that is not known;
        None without any."""
        if self.nodes is None or not self.nodes.gpus_per_node:
            return None
        nodes = tuple(self.nodes.possible)
        return replace(
            assumed_cluster(gpus_of(nodes), self.nodes.gpus_per_node, gpu=self.nodes.gpu or GPU), listed=nodes
        )

    def dtype_and_resources(self, recipe: Recipe, teacher: Architecture) -> tuple[torch.dtype, ResolvedResources]:
        """The dtype that models compute in, and the resources of trials and workers; without GPUs for a cluster whose nodes are
        not known. Raises InputError for assumed GPUs that are too few."""
        resources: ResolvedResources | None = None
        if self.assumed:
            resources = self.assumed.resources(recipe)
            self.assumed.check(resources)
        elif self.nodes:
            joined = self.joined
            resources = resolve_on(recipe, self.nodes.possible, gpu_memory_bytes=joined.gpu_bytes if joined else 0)
            resources = with_room_on(resources, self.nodes.possible)
        # auto means bfloat16 on GPUs
        auto_on_gpus = recipe.teacher.dtype == "auto" and resources is not None and resources.uses_gpus
        dtype = compute_dtype("bfloat16" if auto_on_gpus else recipe.teacher.dtype)
        if resources is None:
            resources = resolve(recipe, 0) if self.address else resources_here(recipe, teacher, dtype.itemsize)
        return dtype, resources

    def gpus(self, resources: ResolvedResources, speed: Speed) -> Cluster | None:
        """The GPUs that times are estimated for: those assumed, those of this machine with the FLOP/s of `speed`, or of the
        cluster; if it does not tell, those that the recipe needs. None if trials or workers have none."""
        if self.assumed:
            return self.assumed
        if not (resources.gpus_per_trial and resources.gpus_per_worker):
            return None
        if not self.elsewhere:
            return cluster_here(torch.cuda.device_count(), speed)
        return self.joined or cluster_for(resources)

    def gpu_nodes(self, recipe: Recipe, resources: ResolvedResources) -> list[GpuNode]:
        """The nodes with GPUs that trials and workers run on, if their main memory is known; one for all of them if they are
        alike."""
        given = recipe.resources.node_memory_bytes
        if given != "auto":
            return [GpuNode(resources.gpus_per_node, int(given))]
        if self.nodes:
            nodes = [GpuNode(int(node.get("GPU", 0)), main_memory(node)) for node in self.nodes.possible]
            return [node for node in nodes if node.gpus]
        return [] if self.elsewhere else [GpuNode(resources.gpus_per_node, machine_memory())]

    def concurrent_trials(self, resources: ResolvedResources, gpus: Cluster | None) -> int:
        """Number of trials that run at the same time. If this machine lacks the GPUs that they need, because those are another
        cluster's, its CPUs are counted instead. gpus: as the method `gpus` returns them."""
        if self.nodes:
            return trials_at_once(resources, self.nodes.possible)
        nodes = gpus.node_list if gpus else [private_node(resources)]
        return trials_at_once(resources, nodes) or trials_at_once(replace(resources, gpus_per_trial=0), nodes)

    def warnings(self, recipe: Recipe, resources: ResolvedResources, dtype: torch.dtype) -> list[str]:
        """What is wasteful about the recipe's resources, or cannot be checked."""
        if self.assumed:
            return gpu_warnings(recipe, resources, self.assumed.node_list, dtype)
        if self.nodes:
            return gpu_warnings(recipe, resources, self.nodes.possible, dtype)
        if self.address:
            return [
                f"the cluster at {self.address} does not tell its nodes to this machine, so that what they have room for is "
                "only checked once it is joined"
            ]
        return gpu_warnings(recipe, resources, [private_node(resources)], dtype)

    def text(self, recipe: Recipe, resources: ResolvedResources, *, trains_on_gpus: bool) -> str:
        """`resources` as a sentence. trains_on_gpus: whether stages that are not done yet do."""
        if self.assumed:
            return room_text(resources, self.assumed.node_list)
        if self.nodes:
            possible = self.nodes.possible
            return room_text(resources, possible) + starting_text(possible, self.nodes.present)
        if not self.address:
            return room_text(resources, [private_node(resources)])
        text = "those of the cluster, reported once it is joined; times, memory and dtype here assume none of its GPUs"
        if recipe.resources.gpu_memory_bytes == "auto" and trains_on_gpus:
            text += f" but those in the recipe, of {resources.gpu_memory_bytes / 1e9:g} GB each"
        return text


def machines_of(address: str | None, assumed: Cluster | None) -> Machines:
    """The machines of a run with this `--address`, or the `assumed` GPUs."""
    if assumed or not joins_cluster(address):
        return Machines(assumed, None, None)
    return Machines(None, address or os.environ.get("RAY_ADDRESS"), _nodes_of(address))


def _nodes_of(address: str | None) -> ClusterNodes | None:
    from minitron_platform.cluster.nodes_at import nodes_at  # imports Ray

    return nodes_at(address)
