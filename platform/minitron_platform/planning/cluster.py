"""The cluster that a plan is made for, and what is assumed of it. Nothing here is measured unless it says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from minitron.device import DATASHEETS, datasheet
from minitron.errors import InputError
from minitron_platform.amounts import counted
from minitron_platform.cluster.room import resolve_on
from minitron_platform.estimates.phases import TOKENS_PER_CPU_SECOND
from minitron_platform.estimates.speed import Speed
from minitron_platform.recipes.resources import NODE_GPUS, ResolvedResources, processes_on, with_room_on
from minitron_platform.recipes.schema import Recipe
from minitron_search.nodes import Node, gpus_of
from minitron_search.placement import max_concurrent_trials

GPU = "H100"
UTILISATION = 0.3  # of the data sheet's FLOP/s, as one H100 had in whole steps of a 3B model; below 1B it is much less
STORAGE_BYTES = 2e9  # per second and node, reading or writing
INSIDE_BYTES = 300e9  # per second that a GPU sends to others of its node (NVLink)
BETWEEN_BYTES = 40e9  # per second that a GPU sends to other nodes (a network card of 400 Gbit/s for each)
WORKER_START = 60.0  # seconds until a group of workers has started
TRIAL_START = 5.0  # seconds of a trial before it computes, besides reading the model
MAX_GPUS = 100_000
NODE_CPUS = 1_000_000  # enough for everything: what counts are the GPUs


@dataclass(frozen=True)
class Cluster:
    """A cluster of equal GPUs, on nodes that are alike unless `listed`.

    Raises InputError for numbers that cannot be."""

    gpus: int
    gpus_per_node: int = NODE_GPUS
    gpu_flops: float = 0.0
    """FLOP/s that a GPU reaches."""
    speed_text: str = ""
    """Where `gpu_flops` comes from."""
    gpu: str = ""
    """Name of its GPUs in `minitron.device.DATASHEETS`, without "NVIDIA"; empty for those of this machine."""
    gpu_bytes: int = 0
    """Memory of a GPU by its data sheet; 0 if it is not known."""
    utilisation: float = UTILISATION
    """Share of the data sheet's FLOP/s that models reach."""
    listed: tuple[Node, ...] = ()
    """The nodes as Ray lists them, of a cluster that is there; `gpus_per_node` are those of the largest."""

    def __post_init__(self) -> None:
        for name, count in (("gpus", self.gpus), ("gpus-per-node", self.gpus_per_node)):
            if not 1 <= count <= MAX_GPUS:
                raise InputError(f"{name}: {count}", f"give a number from 1 to {MAX_GPUS:,}")

    @property
    def nodes(self) -> int:
        """Number of nodes with GPUs."""
        return sum(gpus_of([node]) > 0 for node in self.node_list)

    @property
    def node_list(self) -> list[Node]:
        """The nodes as Ray lists them. Those that are not there have more CPUs than anything needs, and the last may have fewer
        GPUs."""
        if self.listed:
            return list(self.listed)
        sizes = [min(self.gpus_per_node, self.gpus - first) for first in range(0, self.gpus, self.gpus_per_node)]
        return [{"CPU": NODE_CPUS, "GPU": size} for size in sizes]

    def resources(self, recipe: Recipe) -> ResolvedResources:
        """The recipe's resources on this cluster."""
        return self.fitted(resolve_on(recipe, self.node_list, gpu_memory_bytes=self.gpu_bytes))

    def fitted(self, resources: ResolvedResources) -> ResolvedResources:
        """`resources` on this cluster: of a range of workers, as many as have room."""
        return replace(with_room_on(resources, self.node_list), gpus_per_node=self.gpus_per_node)

    def check(self, resources: ResolvedResources) -> None:
        """Raise InputError if trials and workers need more GPUs than there are, or none."""
        workers = resources.least_workers or resources.workers
        of_trial = resources.least_workers_per_trial or resources.workers_per_trial
        needs = (
            ("workers", workers, "gpus_per_worker", resources.gpus_per_worker, resources.worker_share),
            ("workers_per_trial", of_trial, "gpus_per_trial", resources.gpus_per_trial, resources.trial_share),
        )
        for key, count, _, each, _ in needs:
            needed = count * (each or 1)
            if needed > self.gpus:
                raise InputError(
                    f"resources.{key}: {count} need{'s' if count == 1 else ''} {counted(needed, 'GPU')}, and --gpus says "
                    f"{self.gpus}",
                    f"lower resources.{key} or leave it out, or give more with --gpus",
                )
        for _, _, name, each, _ in needs:
            if not each:
                raise InputError(
                    f"resources.{name}: without a GPU for each {name.removeprefix('gpus_per_')}, a cluster of GPUs cannot be "
                    "planned",
                    f"leave resources.{name} out, or leave --gpus out",
                )
        for key, count, name, each, share in needs:
            room = max_concurrent_trials(self.node_list, share)
            if not room:
                raise InputError(
                    f"resources.{name}: {each:g} GPUs on one node, and nodes have {self.gpus_per_node}",
                    f"lower resources.{name}, or give larger nodes with --gpus-per-node",
                )
            if room < count:
                raise InputError(
                    f"resources.{key}: {count} with {each:g} GPUs each, and {self.gpus} GPUs on nodes of "
                    f"{self.gpus_per_node} are enough for {room}",
                    f"lower resources.{key} to {room}, or give more with --gpus",
                )

    def computing_in(self, dtype: torch.dtype) -> Cluster:
        """The same cluster with the FLOP/s that its GPUs have in `dtype` by their data sheet."""
        if not self.gpu:
            return self
        same = assumed_cluster(self.gpus, self.gpus_per_node, gpu=self.gpu, utilisation=self.utilisation, dtype=dtype)
        return replace(same, listed=self.listed)

    def assumptions(self, memory: int, in_fp8: Sequence[str] = ()) -> list[str]:
        """What the times and the settings rest on, one sentence each. memory: bytes of a GPU that the plan goes by. in_fp8:
        recipe keys of the trainings with FP8 products."""
        of_sheet = memory == self.gpu_bytes
        source = f"the data sheet of an {self.gpu}" if of_sheet else "resources.gpu_memory_bytes"
        return [
            self.speed_text,
            *([f"a GPU has {memory / 1e9:g} GB, by {source}"] if self.gpu else []),
            *([f"{', '.join(in_fp8)}: FP8 products are counted as long as those in bfloat16"] if in_fp8 else []),
            f"storage: {STORAGE_BYTES / 1e9:g} GB/s per node; one CPU of each worker tokenises "
            f"{TOKENS_PER_CPU_SECOND:,} tokens/s",
            f"GPUs send {INSIDE_BYTES / 1e9:g} GB/s inside a node and {BETWEEN_BYTES / 1e9:g} GB/s to other nodes, while they "
            "compute",
            f"starting the workers takes {WORKER_START:g} s, a trial {TRIAL_START:g} s; nothing fails; measurements during the "
            "distillation are not counted",
        ]


def assumed_cluster(
    gpus: int,
    gpus_per_node: int = NODE_GPUS,
    *,
    gpu: str = GPU,
    utilisation: float = UTILISATION,
    dtype: torch.dtype = torch.bfloat16,
) -> Cluster:
    """A cluster of GPUs that this machine does not have.

    gpu: name in `minitron.device.DATASHEETS`, without "NVIDIA". utilisation: share of its FLOP/s that models reach. dtype: in
    which they compute, bfloat16 or float32; `plan` takes that of the recipe.

    Raises InputError for a GPU whose data sheet is not known, and for numbers that cannot be.
    """
    sheet = datasheet(gpu)
    if sheet is None:
        names = ", ".join(name.removeprefix("NVIDIA ") for name in DATASHEETS)
        raise InputError(f"gpu: no data sheet is known of {gpu!r}", f"use one of {names}")
    if not 0 < utilisation <= 1:
        raise InputError(f"utilisation: {utilisation:g}", "give a share above 0, up to 1")
    in_lower = {name.lower(): name for name in DATASHEETS}
    gpu = in_lower.get(f"nvidia {gpu.lower().removeprefix('nvidia ')}", gpu).removeprefix("NVIDIA ")
    peak = sheet.float32_flops if dtype == torch.float32 else sheet.bfloat16_flops
    text = (
        f"models reach {utilisation:.0%} of the {peak / 1e12:g} TFLOP/s in the data sheet of an {gpu} in "
        f"{str(dtype).removeprefix('torch.')} (small models reach less)"
    )
    return Cluster(gpus, gpus_per_node, peak * utilisation, text, gpu, sheet.memory, utilisation)


def cluster_for(resources: ResolvedResources) -> Cluster:
    """The smallest cluster with room for all workers and for a trial, on nodes of NODE_GPUS unless a process needs more."""
    needs = (
        (resources.workers, resources.gpus_per_worker),
        (resources.workers_per_trial, resources.gpus_per_trial),
    )
    node = max(NODE_GPUS, *(math.ceil(each) for _, each in needs))

    def gpus(count: int, each: float) -> int:
        full, last = divmod(count - 1, processes_on(node, each))  # a process has all its GPUs on one node
        return full * node + math.ceil((last + 1) * each)

    return assumed_cluster(max(gpus(*need) for need in needs), node)


def cluster_here(gpus: int, speed: Speed) -> Cluster:
    """The GPUs of this machine."""
    reached = f"models reach {speed.training / 1e12:,.1f} TFLOP/s on a GPU of this machine"
    share = f"{speed.training / speed.matmul:.0%} of the {speed.matmul / 1e12:,.0f} TFLOP/s of matrix products"
    text = f"{reached}, measured on {speed.measured}" if speed.measured else f"{reached}, {share}"
    return Cluster(gpus, gpus, speed.training, text)
