"""Plan a run: refuse what cannot work within seconds, and estimate what each stage costs."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minitron import storage
from minitron.architecture import Architecture
from minitron.architecture.hardware import hardware_notes
from minitron.attention import chosen_kernel
from minitron.device import compute_dtype, cores, device
from minitron.distill.fitting import Fit
from minitron.errors import InputError
from minitron.models import check_contents, source_architecture
from minitron_platform.addresses import check_ray_address
from minitron_platform.cluster.room import (
    check_nodes,
    gpus_of,
    joins_cluster,
    private_node,
    resources_here,
    room_text,
    starting_text,
    trials_at_once,
)
from minitron_platform.estimates.gpu import GpuTraining
from minitron_platform.estimates.memory import ProcessMemory, check_memory, machine_memory
from minitron_platform.estimates.node_memory import GpuNode, NodeMemory, NodeWork, trains_on
from minitron_platform.estimates.outlook import Estimate, Outlook
from minitron_platform.estimates.phases import distillation_flops, trial_flops
from minitron_platform.estimates.requests import HEARTBEATS_PER_HOUR, RECORDS_PER_HOUR
from minitron_platform.estimates.speed import Speed, speed_here
from minitron_platform.estimates.teacher import MODES, TeacherCost, teacher_cost
from minitron_platform.estimates.work import Alone
from minitron_platform.locations import Locations, resolve_locations
from minitron_platform.planning.checks import (
    check_benchmarks,
    check_fp8_trainings,
    check_machine,
    check_outcomes,
    check_recipe,
)
from minitron_platform.planning.cluster import GPU, WORKER_START, Cluster, assumed_cluster, cluster_here
from minitron_platform.planning.disk import DiskNeed
from minitron_platform.planning.simulation import simulate
from minitron_platform.recipes.build import has_chats, separates_documents
from minitron_platform.recipes.candidates import family_candidates
from minitron_platform.recipes.consistency import check_consistency
from minitron_platform.recipes.keys import named_by_key
from minitron_platform.recipes.load import changed_recipe, check_recipe_type
from minitron_platform.recipes.resources import NODE_GPUS, ResolvedResources, gpu_warnings, resolve
from minitron_platform.recipes.schema import Member, Recipe
from minitron_platform.stages.finished import finished_stages
from minitron_platform.stages.order import steps
from minitron_platform.stages.search import Search
from minitron_platform.stages.stage import Stage
from minitron_platform.stages.state import RunState
from minitron_platform.tracking.check import check_tracking
from minitron_search.nodes import main_memory

if TYPE_CHECKING:
    from minitron_platform.cluster.nodes_at import ClusterNodes


TRAINING = ("correct", "search", "distill")  # stages that train; the others make forward passes


@dataclass(frozen=True)
class Cost:
    """Estimated cost of one stage."""

    stage: str
    """The stage's name."""
    model: str
    """The model of the family that it is for; empty if the family shares the stage."""
    estimate: Estimate
    seconds: float
    """Rough duration on the cluster, or at the measured speed of this machine."""
    done: bool
    """Whether the storage already has its output."""
    busy: float = 0.0
    """GPU-seconds of computing on the cluster; 0 without one."""
    bound: str = ""
    """What takes the longest on the cluster; empty without one."""

    @property
    def title(self) -> str:
        """For example "smollm2-90m search"."""
        return f"{self.model} {self.stage}" if self.model else self.stage


@dataclass(frozen=True)
class Plan:
    """A run that passed all checks: its teacher, its candidates, and the estimated cost of each stage."""

    recipe: Recipe
    locations: Locations
    teacher: Architecture
    candidates: dict[str, list[Architecture]]
    """Candidates by model of the family; for a model pruned from the previous one, those inside any of its candidates."""
    sampled: frozenset[str]
    """Models whose candidates a sampler will choose; `candidates` then has as many, drawn at random."""
    notes: list[str]
    """Candidates' sizes that save parameters but no time on the hardware."""
    costs: list[Cost]
    """One per stage and model; stages that the family shares come first."""
    teacher_costs: dict[str, TeacherCost]
    """By value of `targets.mode`."""
    dtype: str
    """Compute dtype, by torch's name."""
    speed: Speed
    """Of this machine in `dtype`."""
    free_bytes: int | None
    """Free space of the storage; None if it is not a local disk."""
    warnings: list[str]
    """Problems that do not stop the run from starting."""
    on_gpus: bool
    """Whether models run on GPUs, so that main memory does not limit them."""
    resources: ResolvedResources
    """Resources of trials and workers; without GPUs if a cluster is to be joined, whose GPUs are not known yet."""
    resources_text: str
    """`resources` as a sentence."""
    documents_text: str
    """Whether the documents of a row attend to each other, as a sentence."""
    outlook: Outlook
    """What the estimates are based on."""
    in_fp8: list[str]
    """Recipe keys of the trainings with FP8 products."""
    cluster: Cluster | None = None
    """The GPUs that the times are for; None for the CPUs of this machine."""

    @property
    def bytes(self) -> int:
        """Disk space for the stages that are not done yet."""
        return sum(cost.estimate.bytes for cost in self.costs if not cost.done)

    @property
    def memory(self) -> dict[str, ProcessMemory]:
        """Main memory of the stages that are not done yet, by `Cost.title`; empty if models run on GPUs."""
        return {cost.title: memory for cost, memory in _memories(self.costs, self.on_gpus)}

    @property
    def gpu_memory(self) -> dict[str, Fit]:
        """Settings and memory of each GPU in the trainings that are not done yet, by `Cost.title`; empty on CPUs."""
        return {cost.title: training.fit() for cost, training in _gpu_trainings(self.costs)}

    @property
    def node_memory(self) -> dict[str, NodeMemory]:
        """Main memory of a node in the stages on GPUs that are not done yet, by `Cost.title`; empty on CPUs."""
        gpus = self.resources.gpus_per_node
        return {cost.title: work.on(gpus) for cost, work in _node_works(self.costs)}

    @property
    def seconds(self) -> float:
        """Estimated time for the stages that are not done yet."""
        start = WORKER_START if self.cluster and not all(cost.done for cost in self.costs) else 0.0
        return start + sum(cost.seconds for cost in self.costs if not cost.done)

    @property
    def requests(self) -> int:
        """Requests to the storage for the stages that are not done yet, if it is an object store, heartbeats included."""
        work = sum(cost.estimate.requests for cost in self.costs if not cost.done)
        return work + math.ceil((HEARTBEATS_PER_HOUR + RECORDS_PER_HOUR) * self.seconds / 3600)

    @property
    def gpu_hours(self) -> float:
        """Hours of all GPUs of the cluster, whether they compute or not, for the stages that are not done yet."""
        return self.seconds * self.cluster.gpus / 3600 if self.cluster else 0.0

    def candidate_gpu_hours(self, member: Member, candidate: Architecture) -> tuple[float, float]:
        """Hours that a GPU of the cluster computes for the trial of `candidate`, if no rung stops it, and for its full
        distillation, if it wins."""
        assert self.cluster is not None
        flops = trial_flops(self.outlook, member, candidate), distillation_flops(self.outlook, member, candidate)
        return flops[0] / self.cluster.gpu_flops / 3600, flops[1] / self.cluster.gpu_flops / 3600

    @property
    def idle_share(self) -> float:
        """Share of `gpu_hours` in which GPUs do not compute."""
        busy = sum(cost.busy for cost in self.costs if not cost.done) / 3600
        return 1 - busy / self.gpu_hours if self.gpu_hours else 0.0

    @property
    def price(self) -> float | None:
        """Price of `gpu_hours`; None unless the recipe says what a GPU costs."""
        price = self.recipe.resources.price_per_gpu_hour
        return None if price is None or self.cluster is None else self.gpu_hours * price


def plan(
    recipe: Recipe,
    *,
    storage_path: str | Path | None = None,
    tracking_uri: str | None = None,
    address: str | None = None,
    cluster: Cluster | None = None,
) -> Plan:
    """Check everything about `recipe` that can be checked without carrying it out, and estimate what each stage costs.

    storage_path: any fsspec path (default ./runs or MINITRON_STORAGE). tracking_uri: MLflow's (default SQLite inside the
    storage). address: a running Ray cluster (default: Ray starts on this machine). cluster: GPUs to plan for that need not be
    here, see `minitron_platform.planning.cluster.assumed_cluster` (default: those of this machine or, with an address, those
    that this cluster has or may start; if it does not answer, those that the recipe names).

    Raises InputError or StorageError, naming the key or path and the remedy, for what cannot work: a missing teacher or text,
    a size that no candidate has, an unknown benchmark, a storage that cannot be written, too little disk or memory.
    """
    check_recipe_type(recipe)
    check_ray_address(address or os.environ.get("RAY_ADDRESS"))
    locations = resolve_locations(storage_path, tracking_uri)
    with named_by_key("teacher.model"):
        teacher, max_seq_length = source_architecture(recipe.teacher.model, recipe.teacher.revision)
        check_contents(recipe.teacher.model, recipe.teacher.revision)
    there = _nodes_of(address) if cluster is None and joins_cluster(address) else None
    joined = _assumed(there) if there else None
    on_cluster = (
        resolve(
            recipe,
            gpus_of(there.possible),
            gpu_memory_bytes=joined.gpu_bytes if joined else 0,
            gpus_per_node=there.gpus_per_node or NODE_GPUS,
        )
        if there
        else None
    )
    has_gpus = cluster is not None or (on_cluster is not None and on_cluster.uses_gpus)
    # auto means bfloat16 on GPUs
    dtype = compute_dtype("bfloat16" if has_gpus and recipe.teacher.dtype == "auto" else recipe.teacher.dtype)
    value_bytes = dtype.itemsize
    given = cluster is not None
    uses_cluster = given or joins_cluster(address)
    if cluster:
        resources = cluster.resources(recipe)
        cluster.check(resources)
    elif uses_cluster:
        resources = on_cluster or resolve(recipe, 0)
    else:
        resources = resources_here(recipe, teacher, value_bytes)
    check_recipe(recipe, teacher, max_seq_length)
    family = family_candidates(recipe, teacher)
    candidates = {model: allowed.architectures for model, allowed in family.items()}
    check_outcomes(recipe, teacher, candidates)
    check_machine(resources, locations.storage, elsewhere=uses_cluster)
    if there:
        check_nodes(resources, there.possible)
    known = given or not uses_cluster or recipe.teacher.dtype != "auto"
    gpus_here = resources.uses_gpus and not uses_cluster
    in_fp8 = check_fp8_trainings(recipe, dtype if known else None, gpus_here=gpus_here)
    tracking_warning = check_tracking(locations.tracking_uri, recipe.experiment, recipe.tracking)
    speed = speed_here(dtype)
    cluster = cluster or _known_gpus(resources, speed, uses_cluster, joined)
    cluster = cluster and cluster.computing_in(dtype)
    finished, bytes_written = finished_stages(recipe, locations, dtype)
    check_benchmarks(recipe, max_seq_length, {model: set(stages) for model, stages in finished.family.items()})
    outlook = Outlook.of(
        recipe,
        teacher,
        resources,
        family=family,
        value_bytes=value_bytes,
        concurrent_trials=_concurrent_trials(resources, cluster, there),
    )
    teacher_costs = {mode: teacher_cost(recipe, teacher, outlook.losses, value_bytes, mode) for mode in MODES}
    costs = [_cost(stage, member, outlook, finished, speed, cluster) for stage, member in steps(recipe)]
    costs.sort(key=lambda cost: cost.model != "")  # shared stages first
    on_gpus = torch.cuda.is_available() or resources.uses_gpus
    free = storage.free_bytes(locations.storage) if storage.is_local(locations.storage) else None
    warnings = [tracking_warning] if tracking_warning else []
    nodes = _gpu_nodes(recipe, resources, uses_cluster, there)
    gpus = cluster.gpus if cluster and (given or joined or not uses_cluster) else None
    for cost, training in _gpu_trainings(costs):
        trials = cost.estimate.node.trials if cost.estimate.node else 1
        training.check(_stage_text(cost), gpus=gpus, on_nodes=partial(trains_on, nodes, trials))
    for cost, work in _node_works(costs):
        work.check(_stage_text(cost), nodes)
    if given:
        assert cluster is not None
        warnings += gpu_warnings(recipe, resources, cluster.gpus, dtype)
        resources_text = room_text(resources, cluster.node_list)
    elif there:
        warnings += gpu_warnings(recipe, resources, gpus_of(there.possible), dtype)
        resources_text = room_text(resources, there.possible) + starting_text(there.possible, there.present)
    elif uses_cluster:
        warnings.append(
            f"the cluster at {address or os.environ.get('RAY_ADDRESS')} does not tell its nodes to this machine, so that "
            "what they have room for is only checked once it is joined"
        )
        resources_text = (
            "those of the cluster, reported once it is joined; times, memory and dtype here assume none of its GPUs"
        )
        if recipe.resources.gpu_memory_bytes == "auto" and _gpu_trainings(costs):
            resources_text += f" but those in the recipe, of {resources.gpu_memory_bytes / 1e9:g} GB each"
    else:
        available = machine_memory()
        for cost, memory in _memories(costs, on_gpus):
            check_memory(_stage_text(cost), memory, available, partial(_memory_with, outlook, cost))
        warnings += gpu_warnings(recipe, resources, torch.cuda.device_count(), dtype)
        if in_fp8 and not resources.uses_gpus:
            warnings.append(f"{in_fp8[0]}: CPUs emulate FP8, which is slower than bfloat16; results are those of FP8")
        resources_text = room_text(resources, [private_node(resources)])
    result = Plan(
        recipe=recipe,
        locations=locations,
        teacher=teacher,
        candidates=candidates,
        sampled=frozenset(model for model, allowed in family.items() if allowed.sampled),
        notes=_hardware_notes(teacher, candidates),
        costs=costs,
        teacher_costs=teacher_costs,
        dtype=str(dtype).removeprefix("torch."),
        speed=speed,
        free_bytes=free,
        warnings=warnings,
        on_gpus=on_gpus,
        resources=resources,
        resources_text=resources_text,
        documents_text=_documents_text(recipe),
        outlook=outlook,
        in_fp8=in_fp8,
        cluster=cluster,
    )
    if free is not None and free + bytes_written < result.bytes:
        parts = {cost.title: cost.estimate.bytes for cost in costs if not cost.done}
        need = DiskNeed(locations.storage, result.bytes, free + bytes_written, parts)
        if not given:
            raise need.error(recipe, partial(_fits_on_disk, result, free))
        warnings.append(f"{need.problem}; give the cluster's storage with --storage, or one with more room")
    return result


def _fits_on_disk(planned: Plan, free: int, recipe: Recipe) -> bool:
    """Whether the disk of `planned` has room for `recipe`, which differs in `targets.mode` or `data.train_rows`."""
    outlook = planned.outlook
    cost = teacher_cost(recipe, planned.teacher, outlook.losses, outlook.value_bytes, recipe.targets.mode)
    outlook = replace(outlook, recipe=recipe, teacher_cost=cost)
    finished, written = finished_stages(recipe, planned.locations, compute_dtype(planned.dtype))
    needed = sum(
        stage.estimate(outlook, member).bytes
        for stage, member in steps(recipe)
        if not finished.is_finished(stage, member)
    )
    return needed <= free + written


def _stage_text(cost: Cost) -> str:
    return f"{cost.stage} of {cost.model}" if cost.model else cost.stage


def _nodes_of(address: str | None) -> ClusterNodes | None:
    from minitron_platform.cluster.nodes_at import nodes_at  # imports Ray

    return nodes_at(address)


def _hardware_notes(teacher: Architecture, candidates: dict[str, list[Architecture]]) -> list[str]:
    """The notes on all candidates, each once."""
    notes = [note for shapes in candidates.values() for shape in shapes for note in hardware_notes(teacher, shape)]
    return list(dict.fromkeys(notes))


def _documents_text(recipe: Recipe) -> str:
    on_gpu = chosen_kernel(device()) == "flex"
    if separates_documents(recipe):
        return "those in one row do not attend to each other" + ("" if on_gpu else ", by masks, which are slow on CPUs")
    together = "those in one row attend to each other"
    if recipe.data.separate_documents != "auto":
        return together
    if has_chats(recipe.data):
        return f"{together}, because chats are not told apart (data.separate_documents)"
    return f"{together}; only GPUs separate them at no cost (data.separate_documents)"


def _known_gpus(resources: ResolvedResources, speed: Speed, elsewhere: bool, joined: Cluster | None) -> Cluster | None:
    """The GPUs of this machine with the FLOP/s of `speed`, those of the cluster, or those that the recipe needs `elsewhere`.

    None if trials or workers have none."""
    if not (resources.gpus_per_trial and resources.gpus_per_worker):
        return None
    if not elsewhere:
        return cluster_here(torch.cuda.device_count(), speed)
    if joined:
        return joined
    workers = resources.workers * resources.gpus_per_worker
    trial = resources.workers_per_trial * resources.gpus_per_trial
    return assumed_cluster(math.ceil(max(workers, trial)))


def _assumed(there: ClusterNodes) -> Cluster | None:
    """The GPUs of a cluster that is to be joined, by the data sheet of their model, or of an H100 if it is not known; None
    without any."""
    if not there.gpus_per_node:
        return None
    return assumed_cluster(gpus_of(there.possible), there.gpus_per_node, gpu=there.gpu or GPU)


def _cost(
    stage: Stage[Any],
    member: Member | None,
    outlook: Outlook,
    finished: RunState,
    speed: Speed,
    cluster: Cluster | None,
) -> Cost:
    estimate = stage.estimate(outlook, member)
    cost = Cost(
        stage=stage.name,
        model=member.model if member else "",
        estimate=estimate,
        seconds=estimate.flops / speed.of_stage(stage.name in TRAINING, _cores_used(stage.name, outlook))
        + estimate.start_up_seconds
        + estimate.cpu_seconds(cores()),
        done=finished.is_finished(stage, member),
    )
    if cluster is None:
        return cost
    parts = estimate.parts or (Alone(flops=estimate.flops),)
    time = simulate(parts, estimate.start_up_seconds, cluster, outlook.resources)
    return replace(cost, seconds=time.seconds, busy=time.busy, bound=time.bound)


def _cores_used(stage: str, outlook: Outlook) -> float:
    """CPU cores of this machine that a stage computes on."""
    resources = outlook.resources
    if stage == Search.name:
        return outlook.concurrent_trials * resources.workers_per_trial * resources.cpus_per_trial
    return resources.workers * resources.cpus_per_worker if stage in TRAINING else math.inf


def _memories(costs: list[Cost], on_gpus: bool) -> list[tuple[Cost, ProcessMemory]]:
    """Stages that are not done yet with their main memory; empty if models run on GPUs."""
    unfinished = [] if on_gpus else [cost for cost in costs if not cost.done]
    return [(cost, cost.estimate.memory) for cost in unfinished if cost.estimate.memory is not None]


def _memory_with(outlook: Outlook, cost: Cost, overrides: list[str]) -> ProcessMemory | None:
    """Main memory of a stage with these changes of the recipe; None if they contradict it."""
    recipe = changed_recipe(outlook.recipe, overrides)
    try:
        check_consistency(recipe)
        resources = resources_here(recipe, outlook.teacher, outlook.value_bytes)
        changed = replace(outlook, recipe=recipe, resources=resources)
        (estimate,) = (
            stage.estimate(changed, member)
            for stage, member in steps(recipe)
            if (stage.name, member.model if member else "") == (cost.stage, cost.model)
        )
    except InputError:
        return None
    return estimate.memory


def _gpu_trainings(costs: list[Cost]) -> list[tuple[Cost, GpuTraining]]:
    """Trainings on GPUs that are not done yet."""
    return [(cost, cost.estimate.gpu) for cost in costs if cost.estimate.gpu is not None and not cost.done]


def _node_works(costs: list[Cost]) -> list[tuple[Cost, NodeWork]]:
    """Work on nodes with GPUs that is not done yet."""
    return [(cost, cost.estimate.node) for cost in costs if cost.estimate.node is not None and not cost.done]


def _gpu_nodes(
    recipe: Recipe, resources: ResolvedResources, uses_cluster: bool, there: ClusterNodes | None
) -> list[GpuNode]:
    """The nodes with GPUs that trials and workers run on, if their main memory is known."""
    given = recipe.resources.node_memory_bytes
    if given != "auto":
        return [GpuNode(resources.gpus_per_node, int(given))]
    if there:
        nodes = {(int(node.get("GPU", 0)), main_memory(node)) for node in there.possible}
        return [GpuNode(gpus, memory) for gpus, memory in sorted(nodes) if gpus]
    return [] if uses_cluster else [GpuNode(resources.gpus_per_node, machine_memory())]


def _concurrent_trials(resources: ResolvedResources, cluster: Cluster | None, there: ClusterNodes | None) -> int:
    """Number of trials that run at the same time on the cluster or on this machine. If it lacks the GPUs that they need,
    because those are another cluster's, its CPUs are counted instead."""
    if there:
        return trials_at_once(resources, there.possible)
    nodes = cluster.node_list if cluster else [private_node(resources)]
    return trials_at_once(resources, nodes) or trials_at_once(replace(resources, gpus_per_trial=0), nodes)
