"""Plan a run: refuse what cannot work within seconds, and estimate what each stage costs."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

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
    resources_here,
)
from minitron_platform.estimates.gpu import GpuTraining
from minitron_platform.estimates.memory import ProcessMemory, check_memory, machine_memory
from minitron_platform.estimates.node_memory import NodeMemory, NodeWork, trains_on
from minitron_platform.estimates.outlook import Estimate, Outlook
from minitron_platform.estimates.phases import distillation_flops, trial_flops
from minitron_platform.estimates.requests import HEARTBEATS_PER_HOUR, RECORDS_PER_HOUR
from minitron_platform.estimates.speed import Speed, speed_here
from minitron_platform.estimates.teacher import MODES, TeacherCost, teacher_cost
from minitron_platform.estimates.work import Trials
from minitron_platform.locations import Locations, resolve_locations
from minitron_platform.planning.checks import (
    check_benchmarks,
    check_fp8_trainings,
    check_machine,
    check_outcomes,
    check_recipe,
)
from minitron_platform.planning.cluster import WORKER_START, Cluster
from minitron_platform.planning.disk import DiskNeed
from minitron_platform.planning.machines import Machines, machines_of
from minitron_platform.planning.simulation import simulate
from minitron_platform.recipes.build import has_chats, separates_documents
from minitron_platform.recipes.candidates import family_candidates
from minitron_platform.recipes.consistency import check_consistency
from minitron_platform.recipes.keys import named_by_key
from minitron_platform.recipes.load import changed_recipe, check_recipe_type
from minitron_platform.recipes.resources import ResolvedResources, idle_workers_warning
from minitron_platform.recipes.schema import Member, Recipe
from minitron_platform.stages.finished import finished_stages
from minitron_platform.stages.order import steps
from minitron_platform.stages.search import Search
from minitron_platform.stages.stage import Stage
from minitron_platform.stages.state import RunState
from minitron_platform.tracking.check import check_tracking
from minitron_platform.tracking.registry import check_not_prompts

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
    """Speed of this machine in `dtype`."""
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
    machines = machines_of(address, cluster)
    dtype, resources = machines.dtype_and_resources(recipe, teacher)
    check_recipe(recipe, teacher, max_seq_length)
    family = family_candidates(recipe, teacher)
    candidates = {model: allowed.architectures for model, allowed in family.items()}
    check_outcomes(recipe, teacher, candidates)
    check_machine(resources, locations.storage, elsewhere=machines.elsewhere)
    if machines.nodes:
        check_nodes(resources, machines.nodes.possible)
    is_dtype_known = machines.address is None or recipe.teacher.dtype != "auto"
    gpus_here = resources.uses_gpus and not machines.elsewhere
    in_fp8 = check_fp8_trainings(recipe, dtype if is_dtype_known else None, gpus_here=gpus_here)
    tracking_warning = check_tracking(locations.tracking_uri, recipe.experiment, recipe.tracking)
    if tracking_warning is None:
        models = {f"{recipe.key(member)}.model": member.model for member in recipe.family}
        check_not_prompts(locations.tracking_uri, models)
    speed = speed_here(dtype)
    cluster = machines.gpus(resources, speed)
    cluster = cluster and cluster.computing_in(dtype)
    finished, bytes_written = finished_stages(recipe, locations, dtype)
    check_benchmarks(recipe, max_seq_length, {model: set(stages) for model, stages in finished.family.items()})
    outlook = Outlook.of(
        recipe,
        teacher,
        resources,
        family=family,
        value_bytes=dtype.itemsize,
        concurrent_trials=machines.concurrent_trials(resources, cluster),
    )
    costs = [_cost(stage, member, outlook, finished, speed, cluster) for stage, member in steps(recipe)]
    costs.sort(key=lambda cost: cost.model != "")  # shared stages first
    on_gpus = torch.cuda.is_available() or resources.uses_gpus
    _check_main_memory(costs, outlook, machines, on_gpus)
    memory_warning = _check_gpu_memory(costs, outlook, machines, cluster)
    warnings = list(filter(None, [tracking_warning, memory_warning]))
    warnings += machines.warnings(recipe, resources, dtype)
    warnings += filter(None, [idle_workers_warning(recipe, resources)])
    if in_fp8 and not machines.elsewhere and not resources.uses_gpus:
        warnings.append(f"{in_fp8[0]}: CPUs emulate FP8, which is slower than bfloat16; results are those of FP8")
    result = Plan(
        recipe=recipe,
        locations=locations,
        teacher=teacher,
        candidates=candidates,
        sampled=frozenset(model for model, allowed in family.items() if allowed.sampled),
        notes=_hardware_notes(teacher, candidates),
        costs=costs,
        teacher_costs={mode: teacher_cost(recipe, teacher, outlook.losses, dtype.itemsize, mode) for mode in MODES},
        dtype=str(dtype).removeprefix("torch."),
        speed=speed,
        free_bytes=storage.free_bytes(locations.storage) if storage.is_local(locations.storage) else None,
        warnings=warnings,
        on_gpus=on_gpus,
        resources=resources,
        resources_text=machines.text(recipe, resources, trains_on_gpus=bool(_gpu_trainings(costs))),
        documents_text=_documents_text(recipe),
        outlook=outlook,
        in_fp8=in_fp8,
        cluster=cluster,
    )
    if lack := _missing_disk(result, bytes_written):
        if machines.assumed is None:
            raise lack.error(recipe, partial(_fits_on_disk, result))
        warnings.append(f"{lack.problem}; give the cluster's storage with --storage, or one with more room")
    return result


def _check_main_memory(costs: list[Cost], outlook: Outlook, machines: Machines, on_gpus: bool) -> None:
    """Raise InputError for a stage that needs more main memory than this machine has; nodes of clusters check their own."""
    if not machines.elsewhere:
        available = machine_memory()
        for cost, memory in _memories(costs, on_gpus):
            check_memory(_stage_text(cost), memory, available, partial(_memory_with, outlook, cost))


def _check_gpu_memory(costs: list[Cost], outlook: Outlook, machines: Machines, cluster: Cluster | None) -> str | None:
    """Raise InputError for a stage that does not fit on the GPUs of `cluster`, or in the main memory of their nodes. Returns a
    warning about the stage that needs most of it, if only some of the nodes have as much."""
    nodes = machines.gpu_nodes(outlook.recipe, outlook.resources)
    is_known = machines.address is None or machines.joined is not None
    for cost, training in _gpu_trainings(costs):
        trials = cost.estimate.node.trials if cost.estimate.node else 1
        gpus = cluster.gpus if cluster and is_known else None
        training.check(_stage_text(cost), gpus=gpus, on_nodes=partial(trains_on, nodes, trials))
    works = _node_works(costs)
    for cost, work in works:
        work.check(_stage_text(cost), nodes)
    works.sort(key=lambda entry: entry[1].on(outlook.resources.gpus_per_node).total, reverse=True)
    return next((text for cost, work in works if (text := work.warning(_stage_text(cost), nodes))), None)


def _missing_disk(planned: Plan, bytes_written: int) -> DiskNeed | None:
    """The disk space that a plan needs, if there is less. bytes_written: what an unfinished stage has written already."""
    if planned.free_bytes is None or planned.free_bytes + bytes_written >= planned.bytes:
        return None
    parts = {cost.title: cost.estimate.bytes for cost in planned.costs if not cost.done}
    return DiskNeed(planned.locations.storage, planned.bytes, planned.free_bytes + bytes_written, parts)


def _fits_on_disk(planned: Plan, recipe: Recipe) -> bool:
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
    assert planned.free_bytes is not None
    return needed <= planned.free_bytes + written


def _stage_text(cost: Cost) -> str:
    return f"{cost.stage} of {cost.model}" if cost.model else cost.stage


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
        seconds=estimate.flops / speed.of_stage(stage.name in TRAINING, _cores_used(stage.name, outlook, estimate))
        + estimate.start_up_seconds
        + estimate.cpu_seconds(cores()),
        done=finished.is_finished(stage, member),
    )
    if cluster is None:
        return cost
    time = simulate(estimate.parts, estimate.start_up_seconds, cluster, outlook.resources)
    return replace(cost, seconds=time.seconds, busy=time.busy, bound=time.bound)


def _cores_used(stage: str, outlook: Outlook, estimate: Estimate) -> float:
    """CPU cores of this machine that a stage computes on: of a search, those of the trials that there are, and that its memory
    has room for."""
    resources = outlook.resources
    if stage == Search.name:
        assert estimate.memory is not None
        room = machine_memory() // (estimate.memory.processes * estimate.memory.each.total)
        most = max(len(part.shares) for part in estimate.parts if isinstance(part, Trials))
        trials = min(outlook.concurrent_trials, most, max(1, room))
        return trials * resources.workers_per_trial * resources.cpus_per_trial
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
