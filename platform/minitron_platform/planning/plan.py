"""What a run will do and cost, before it starts; what cannot work is refused here, in seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from minitron import storage
from minitron.architecture import Architecture
from minitron.architecture.hardware import hardware_notes
from minitron.device import compute_dtype, matmul_flops
from minitron.errors import prefixed
from minitron.models import check_contents, source_architecture
from minitron_platform.cluster.room import (
    joins_cluster,
    private_node,
    resources_here,
    room_text,
    trials_at_once,
)
from minitron_platform.estimates.memory import ProcessMemory, check_memory, machine_memory
from minitron_platform.estimates.outlook import Estimate, Outlook
from minitron_platform.estimates.teacher import MODES, TeacherCost, teacher_cost, too_little_room
from minitron_platform.locations import Locations, resolve_locations
from minitron_platform.planning.checks import check_benchmarks, check_machine, check_outcomes, check_recipe
from minitron_platform.recipes.build import distillation_losses
from minitron_platform.recipes.candidates import family_candidates
from minitron_platform.recipes.resources import ResolvedResources, left_idle, resolve
from minitron_platform.recipes.schema import Member, Recipe
from minitron_platform.stages.finished import finished_stages
from minitron_platform.stages.order import steps
from minitron_platform.stages.stage import Stage
from minitron_platform.stages.state import RunState
from minitron_platform.stages.targets import Targets
from minitron_platform.tracking.check import check_tracking

EFFICIENCY = 0.5  # of large matrices' speed, as seen on CPUs for small models


@dataclass(frozen=True)
class Cost:
    """What one stage takes, for `model` of the family where each has its own; `seconds` is a rough time at the speed
    measured."""

    stage: str
    model: str
    estimate: Estimate
    seconds: float
    done: bool

    @property
    def title(self) -> str:
        return f"{self.model} {self.stage}" if self.model else self.stage


@dataclass(frozen=True)
class Plan:
    """A run that can work: its teacher, its candidates, and what each stage costs."""

    recipe: Recipe
    locations: Locations
    teacher: Architecture
    candidates: dict[str, list[Architecture]]  # by model of the family, those that any outcome before it allows
    sampled: frozenset[str]  # models whose candidates the scores decide; here as many are drawn at random
    notes: list[str]  # what is smaller but will not be faster
    costs: list[Cost]
    teacher_costs: dict[str, TeacherCost]  # by targets.mode, the recipe's and the other
    dtype: str
    flops_per_second: float
    free_bytes: int | None
    warnings: list[str]  # what may come right by itself before it matters
    on_gpus: bool  # models run on GPUs, so that main memory is not what limits them
    resources: ResolvedResources  # without GPUs where a cluster is to be joined, whose are not known yet
    resources_text: str

    @property
    def bytes(self) -> int:
        """What the disk needs for the stages that are not done yet."""
        return sum(cost.estimate.bytes for cost in self.costs if not cost.done)

    @property
    def memory(self) -> dict[str, ProcessMemory]:
        """Main memory of the stages that are not done yet, by `Cost.title`; none where models run on GPUs."""
        return {cost.title: memory for cost, memory in _memories(self.costs, self.on_gpus)}

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs if not cost.done)


def plan(
    recipe: Recipe, *, storage_path: str | None = None, tracking_uri: str | None = None, address: str | None = None
) -> Plan:
    """Check everything about a recipe that can be known without doing it, and add up what it costs.

    Raises InputError or StorageError, naming the key or path and the remedy, for what cannot work: a teacher or text that
    is missing, a target that no candidate meets, an unknown task, a place that cannot be written, too little room.
    """
    where = resolve_locations(storage_path, tracking_uri)
    with prefixed("teacher.model: "):
        teacher, longest = source_architecture(recipe.teacher.model, recipe.teacher.revision)
        check_contents(recipe.teacher.model, recipe.teacher.revision)
    dtype = compute_dtype(recipe.teacher.dtype)
    value_bytes = 2 if dtype == torch.bfloat16 else 4
    joins = joins_cluster(address)
    resources = resolve(recipe, 0) if joins else resources_here(recipe, teacher, value_bytes)
    check_recipe(recipe, resources, teacher, longest)
    family = family_candidates(recipe, teacher)
    found = {model: candidates.architectures for model, candidates in family.items()}
    check_outcomes(recipe, teacher, found)
    losses = {model: distillation_losses(recipe, largest, teacher)[0] for model, (largest, *_) in found.items()}
    check_machine(resources, where.storage, address)
    away = check_tracking(where.tracking_uri, recipe.experiment)
    speed = matmul_flops(dtype)
    finished, written = finished_stages(recipe, where)
    check_benchmarks(recipe, longest, {model: set(stages) for model, stages in finished.family.items()})
    modes = {mode: teacher_cost(recipe, teacher, losses, value_bytes, mode) for mode in MODES}
    outlook = Outlook(
        recipe=recipe,
        resources=resources,
        teacher=teacher,
        family=family,
        losses=losses,
        targets=modes[recipe.targets.mode],
        value_bytes=value_bytes,
        concurrent_trials=_concurrent_trials(resources),
    )
    costs = [_cost(stage, member, outlook, finished, speed) for stage, member in steps(recipe)]
    costs.sort(key=lambda cost: cost.model != "")  # what the family shares first
    on_gpus = torch.cuda.is_available() or resources.gpus_per_trial > 0 or resources.gpus_per_worker > 0
    free = storage.free_bytes(where.storage) if storage.is_local(where.storage) else None
    notes, name = _notes(teacher, found), str(dtype).removeprefix("torch.")
    warnings = [away] if away else []
    if joins:
        room = "what the cluster has, said once it is joined; times and memory here count on none of its GPUs"
    else:
        available = machine_memory()
        for cost, memory in _memories(costs, on_gpus):
            check_memory(f"{cost.stage} of {cost.model}" if cost.model else cost.stage, memory, available)
        warnings += left_idle(recipe, resources, torch.cuda.device_count())
        room = room_text(resources, [private_node(resources)])
    result = Plan(
        recipe=recipe,
        locations=where,
        teacher=teacher,
        candidates=found,
        sampled=frozenset(model for model, candidates in family.items() if candidates.sampled),
        notes=notes,
        costs=costs,
        teacher_costs=modes,
        dtype=name,
        flops_per_second=speed,
        free_bytes=free,
        warnings=warnings,
        on_gpus=on_gpus,
        resources=resources,
        resources_text=room,
    )
    if free is not None and free + written < result.bytes:
        missing = {} if Targets.name in finished.shared else modes
        raise too_little_room(recipe, teacher, missing, value_bytes, where.storage, result.bytes, free + written)
    return result


def _notes(teacher: Architecture, found: dict[str, list[Architecture]]) -> list[str]:
    notes = [note for shapes in found.values() for shape in shapes for note in hardware_notes(teacher, shape)]
    return list(dict.fromkeys(notes))


def _cost(stage: Stage[Any], member: Member | None, outlook: Outlook, finished: RunState, speed: float) -> Cost:
    estimate = stage.estimate(outlook, member)
    return Cost(
        stage=stage.name,
        model=member.model if member else "",
        estimate=estimate,
        seconds=estimate.flops / (speed * EFFICIENCY) + estimate.start_up_seconds,
        done=finished.is_finished(stage, member),
    )


def _memories(costs: list[Cost], on_gpus: bool) -> list[tuple[Cost, ProcessMemory]]:
    """The stages that are not done yet with their main memory, where that is what limits them."""
    waiting = [] if on_gpus else [cost for cost in costs if not cost.done]
    return [(cost, cost.estimate.memory) for cost in waiting if cost.estimate.memory is not None]


def _concurrent_trials(resources: ResolvedResources) -> int:
    """Trials that run at once here; where the GPUs are those of a cluster, as many as CPUs here would do."""
    here = [private_node(resources)]
    return trials_at_once(resources, here) or trials_at_once(replace(resources, gpus_per_trial=0), here)
