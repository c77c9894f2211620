"""What a run will do and cost, before it starts; what cannot work is refused here, in seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from minitron import storage
from minitron.architecture import Architecture
from minitron.architecture.hardware import hardware_notes
from minitron.device import compute_dtype, matmul_flops
from minitron.distill import Losses
from minitron.errors import prefixed
from minitron.models import check_contents, source_architecture
from minitron_platform.cluster.room import (
    counted,
    joins_cluster,
    private_node,
    resources_here,
    room_text,
    trials_at_once,
)
from minitron_platform.estimates.memory import StageMemory, check_memory, machine_memory, stage_memories
from minitron_platform.estimates.teacher import MODES, TeacherCost, runs_beside, teacher_cost, too_little_room
from minitron_platform.pipeline import finished_stages
from minitron_platform.planning.checks import check_benchmarks, check_machine, check_outcomes, check_recipe
from minitron_platform.recipes.build import distillation_losses, layer_scoring
from minitron_platform.recipes.candidates import MemberCandidates, family_candidates
from minitron_platform.recipes.resources import ResolvedResources, left_idle, resolve
from minitron_platform.recipes.schema import Member, Recipe, Training
from minitron_platform.recipes.search_schedule import SearchSchedule
from minitron_platform.stages.context import Places, places
from minitron_platform.tracking.check import check_tracking
from minitron_search.space import combinations

MASTER_BYTES = 12  # float32 weights and two moments: what a checkpoint holds per parameter


@dataclass(frozen=True)
class Cost:
    """Work of one stage, for `model` of the family where each has its own: forward and backward tokens are in `flops`;
    `seconds` is a rough time at the speed measured."""

    stage: str
    model: str
    what: str
    flops: float
    bytes: int
    seconds: float
    done: bool = False


@dataclass(frozen=True)
class Plan:
    """A run that can work: its teacher, its candidates, and what each stage costs."""

    recipe: Recipe
    places: Places
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
    memory: list[StageMemory]  # of the stages that are not done yet
    resources: ResolvedResources  # without GPUs where a cluster is to be joined, whose are not known yet
    resources_text: str

    @property
    def bytes(self) -> int:
        """What the disk needs for the stages that are not done yet."""
        return sum(cost.bytes for cost in self.costs if not cost.done)

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
    where = places(storage_path, tracking_uri)
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
    costs = [
        replace(cost, done=cost.stage in finished.family.get(cost.model, finished.shared))
        for cost in _costs(recipe, resources, teacher, family, losses, modes[recipe.targets.mode], value_bytes, speed)
    ]
    free = storage.free_bytes(where.storage) if storage.is_local(where.storage) else None
    notes, name = _notes(teacher, found), str(dtype).removeprefix("torch.")
    memory = [
        stage
        for stage in stage_memories(recipe, resources, teacher, found, losses, value_bytes)
        if stage.stage not in finished.family.get(stage.model, finished.shared)
    ]
    warnings = [away] if away else []
    if joins:
        room = "what the cluster has, said once it is joined; times and memory here count on none of its GPUs"
    else:
        check_memory(memory, machine_memory())
        warnings += left_idle(recipe, resources, torch.cuda.device_count())
        room = room_text(resources, [private_node(resources)])
    result = Plan(
        recipe=recipe,
        places=where,
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
        memory=memory,
        resources=resources,
        resources_text=room,
    )
    if free is not None and free + written < result.bytes:
        missing = {} if "targets" in finished.shared else modes
        raise too_little_room(recipe, teacher, missing, value_bytes, where.storage, result.bytes, free + written)
    return result


def _notes(teacher: Architecture, found: dict[str, list[Architecture]]) -> list[str]:
    notes = [note for shapes in found.values() for shape in shapes for note in hardware_notes(teacher, shape)]
    return list(dict.fromkeys(notes))


def _costs(
    recipe: Recipe,
    resources: ResolvedResources,
    teacher: Architecture,
    family: dict[str, MemberCandidates],
    losses: dict[str, Losses],
    stored: TeacherCost,
    value_bytes: int,
    speed: float,
) -> list[Cost]:
    data, seq = recipe.data, recipe.data.seq_length
    rows = data.train_rows + data.heldout_rows
    work: list[tuple[str, str, str, float, int]] = [
        ("teacher", "", f"{teacher.num_parameters / 1e6:,.1f}M parameters", 0, teacher.num_parameters * value_bytes),
        ("data", "", f"{rows:,} rows of {seq} tokens", 0, rows * seq * 4),
        ("correct", "", *_correction(recipe, teacher, value_bytes)),
        (
            "targets",
            "",
            f"{stored.rows * seq:,} tokens, once through the teacher",
            stored.stored_flops,
            stored.bytes,
        ),
    ]
    for member in recipe.family:
        own = family[member.model]
        work += _member_costs(recipe, resources, member, teacher, own, losses[member.model], value_bytes)
    efficiency = 0.5  # of large matrices' speed, as seen on CPUs for small models
    start_up = {"teacher": 20, "data": 15, "search": 20, "distill": 20, "evaluate": 10, "register": 2}
    return [
        Cost(stage, model, what, flops, size, flops / (speed * efficiency) + start_up.get(stage, 5))
        for stage, model, what, flops, size in work
    ]


def _head_flops(architecture: Architecture) -> int:
    return 2 * architecture.vocab_size * architecture.hidden_size


def _correction(recipe: Recipe, teacher: Architecture, value_bytes: int) -> tuple[str, float, int]:
    asked, training = recipe.correct, recipe.correction()
    if asked is None or training is None:
        return "not asked for", 0, 0
    tokens = training.steps * training.batch_rows * recipe.data.seq_length
    # at the probe there is a checkpoint in any case; of norms and adapters it is next to nothing
    sizes = (3 * MASTER_BYTES if asked.method == "full" else 0) + 2 * value_bytes
    return (
        f"{asked.method}, at most {tokens:,} tokens, {asked.when}",
        3.0 * tokens * teacher.flops_per_token(recipe.data.seq_length),
        sizes * teacher.num_parameters,
    )


def _search_text(
    recipe: Recipe, member: Member, at_most: str, candidates: int, sampled: bool, distilled: int, tokens: int
) -> str:
    """How many candidates go how far."""
    timed = ""
    if member.limits and member.limits.latency_ms:
        timed = f"at least {candidates} shapes timed, " if sampled else f"{at_most}{candidates} shapes timed, "
    scored = f"{timed}{at_most}{candidates} candidates" + (" scored" if recipe.search.forward else "")
    if sampled:
        scored += f" of {combinations(member.space):,} combinations"
    most = f", {distilled} distilled" if recipe.search.forward else ""
    rule, asked = recipe.search.halving, recipe.search.evaluate
    when = " where the order holds" if rule and rule.grace == "stable" else ""
    fewer = f", the worse stopped at rungs{when}" if rule else ""
    last = f", {', '.join(task.name for task in asked.tasks)} for {min(asked.keep, distilled)}" if asked else ""
    return f"{scored}{most}, {tokens:,} tokens each{fewer}{last}"


def _member_costs(
    recipe: Recipe,
    resources: ResolvedResources,
    member: Member,
    teacher: Architecture,
    own: MemberCandidates,
    losses: Losses,
    value_bytes: int,
) -> list[tuple[str, str, str, float, int]]:
    data, seq = recipe.data, recipe.data.seq_length
    forward, shapes = teacher.flops_per_token(seq), own.architectures
    before, base = recipe.origin(member), own.space.base
    schedule = SearchSchedule(recipe.search)
    scoring = layer_scoring(recipe.calibrate, base.num_layers, {a.num_layers for a in shapes})
    # on average half of the layers are behind a removed block; a task's documents are not known here
    passes = scoring.passes(base.num_layers, scoring.rows or 0) / 2 if scoring.metric in ("loss", "logit_error") else 0
    largest = max(a.num_parameters for a in shapes)

    def training(architecture: Architecture, tokens: int) -> float:
        # forward and backward of the student, the teacher's head, and the loss's second look at the student's
        return tokens * (3 * architecture.flops_per_token(seq) + _head_flops(teacher))

    distillation = recipe.distillation(member)
    batch = recipe.search.training.batch_rows
    distilled = schedule.distilled(len(shapes), len(member.points))
    all_tokens = schedule.total_steps(distilled) * batch * seq
    distill_tokens = distillation.steps * distillation.batch_rows * seq
    compared = min(recipe.search.heldout_rows or data.heldout_rows, data.heldout_rows)
    documents = sum(task.limit or 1000 for task in recipe.evaluate.tasks)
    here = [private_node(resources)]
    # as many as CPUs here would do where the GPUs are those of a cluster
    slots = trials_at_once(resources, here) or trials_at_once(replace(resources, gpus_per_trial=0), here)
    at_once = max(1, min(len(shapes), slots))
    live = runs_beside(losses, recipe.targets.mode)
    models = 3 if member is recipe.family[0] else 2  # the teacher is evaluated once

    def checkpoints(settings: Training, runs: int) -> int:
        return 3 * MASTER_BYTES * largest * runs if settings.checkpoint_every else 0

    mean_flops = sum(a.flops_per_token(seq) for a in shapes) / len(shapes)  # which are distilled is not known
    at_most = "up to " if before else ""
    asked = recipe.search.evaluate
    benchmarked = min(asked.keep, distilled) * sum(task.limit or 1000 for task in asked.tasks) if asked else 0
    work: list[tuple[str, str, float, int]] = [
        (
            "calibrate",
            f"{recipe.calibrate.rows} rows, layers by {recipe.calibrate.layers}, {recipe.calibrate.depth}",
            base.flops_per_token(seq) * seq * (recipe.calibrate.rows + passes),
            4 * base.num_layers * base.intermediate_size,
        ),
        (
            "search",
            _search_text(recipe, member, at_most, len(shapes), own.sampled, distilled, schedule.steps * batch * seq),
            all_tokens * (3 * mean_flops + _head_flops(teacher))
            + (len(shapes) + (1 + len(schedule.rungs)) * distilled)
            * compared
            * seq
            * (mean_flops + _head_flops(teacher))
            + benchmarked * 90 * mean_flops,
            (2 * MASTER_BYTES * largest * distilled if schedule.halving else 0)  # all wait at the rung
            + (value_bytes * largest * distilled if asked else 0)  # all keep their weights to the end
            + checkpoints(recipe.search.training, at_once),
        ),
        (
            "distill",
            f"{distill_tokens:,} tokens on {counted(resources.workers, 'worker')}"
            + (", with the teacher" if live else ""),
            training(shapes[0], distill_tokens) + (forward * distill_tokens if live else 0),
            checkpoints(distillation, 1) + 2 * largest * value_bytes,
        ),
        (
            "evaluate",
            f"{models} models, {', '.join(task.name for task in recipe.evaluate.tasks) or 'held-out rows only'}",
            forward * models * (documents * 90 + data.heldout_rows * seq),
            0,
        ),
        ("register", f"{member.model} as {recipe.register_as.alias}", 0, 0),
    ]
    return [(stage, member.model, what, flops, size) for stage, what, flops, size in work]
