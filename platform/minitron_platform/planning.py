"""What a run will do and cost, before it starts; what cannot work is refused here, in seconds."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

import torch

from minitron import storage
from minitron.architecture import Architecture
from minitron.data import source_identity as text_identity
from minitron.device import compute_dtype, device
from minitron.errors import InputError, StorageError
from minitron.evaluation import Task, check_tasks
from minitron.models import source_architecture
from minitron_platform.context import Places, places
from minitron_platform.pipeline import finished_stages
from minitron_platform.recipe import Recipe, Training
from minitron_platform.stages.data import source as text_source
from minitron_platform.stages.search import architectures

MASTER_BYTES = 12  # float32 weights and two moments: what a checkpoint holds per parameter


@dataclass(frozen=True)
class Cost:
    """Work of one stage: forward and backward tokens are in `flops`; `seconds` is a rough time at the speed measured."""

    stage: str
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
    candidates: list[Architecture]
    costs: list[Cost]
    dtype: str
    flops_per_second: float
    free_bytes: int | None

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
    teacher, longest = source_architecture(recipe.teacher.model, recipe.teacher.revision)
    _check_context(recipe, longest)
    found = architectures(recipe, teacher)
    text_identity(text_source(recipe.data))
    check_tasks([Task(**task.model_dump()) for task in recipe.evaluate.tasks])
    _check_rows(recipe)
    _check_training(recipe)
    if address is None and not os.environ.get("RAY_ADDRESS"):
        _check_gpus(recipe)
    _check_writable(where.storage)
    dtype = compute_dtype(recipe.teacher.dtype)
    speed = _measured_speed(dtype)
    done, written = finished_stages(recipe, where)
    costs = [
        replace(cost, done=cost.stage in done)
        for cost in _costs(recipe, teacher, found, 2 if dtype == torch.bfloat16 else 4, speed)
    ]
    free = storage.free_bytes(where.storage) if storage.is_local(where.storage) else None
    result = Plan(recipe, where, teacher, found, costs, str(dtype).removeprefix("torch."), speed, free)
    if free is not None and free + written < result.bytes:
        raise StorageError(
            f"{where.storage}: the run needs about {result.bytes / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free",
            "free some space, choose another place with --storage, or lower data.train_rows",
        )
    return result


def _check_training(recipe: Recipe) -> None:
    for key, training in (("search.training", recipe.search.training), ("distill", recipe.distill)):
        if training.min_lr > training.peak_lr:
            raise InputError(f"{key}.min_lr: {training.min_lr} is above peak_lr {training.peak_lr}", "lower min_lr")
        if training.warmup_steps >= training.steps:
            raise InputError(
                f"{key}.warmup_steps: {training.warmup_steps} leaves nothing of {training.steps} steps",
                "use fewer warm-up steps, or more steps",
            )


def _check_rows(recipe: Recipe) -> None:
    data = recipe.data
    for key, asked, split, there in (
        ("calibrate.rows", recipe.calibrate.rows, "data.train_rows", data.train_rows),
        ("search.heldout_rows", recipe.search.heldout_rows or 0, "data.heldout_rows", data.heldout_rows),
    ):
        if asked > there:
            raise InputError(f"{key}: {asked} is more than {split} = {there}", f"use at most {there}")


def _check_context(recipe: Recipe, longest: int | None) -> None:
    if longest is not None and recipe.data.seq_length > longest:
        raise InputError(
            f"data.seq_length: {recipe.data.seq_length} is more than the {longest} tokens that the teacher takes",
            f"use at most {longest}",
        )


def _check_gpus(recipe: Recipe) -> None:
    resources, there = recipe.resources, torch.cuda.device_count()
    wanted = max(resources.gpus_per_trial, resources.workers * resources.gpus_per_worker)
    if wanted > there:
        raise InputError(
            f"resources: {wanted:g} GPUs are asked for and this machine has {there}",
            "set gpus_per_trial and gpus_per_worker to 0, give --address, or submit to a cluster",
        )


def _check_writable(path: str) -> None:
    probe = storage.join(path, ".writable")
    storage.write_bytes(probe, b"")
    storage.remove(probe)


def _measured_speed(dtype: torch.dtype, size: int = 1024) -> float:
    """Multiply-add speed of large matrices here, FLOP/s."""
    a = torch.ones(size, size, dtype=dtype, device=device())
    a @ a
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        a @ a
        rounds += 1
        if a.is_cuda:
            torch.cuda.synchronize()
    return rounds * 2 * size**3 / (time.perf_counter() - started)


def _costs(
    recipe: Recipe, teacher: Architecture, found: list[Architecture], value_bytes: int, speed: float
) -> list[Cost]:
    data, seq = recipe.data, recipe.data.seq_length
    forward = teacher.flops_per_token(seq)
    rows = data.train_rows + data.heldout_rows
    depths = {teacher.num_layers - a.num_layers for a in found} - {0} if recipe.calibrate.layers == "loss" else set()
    passes = sum((teacher.num_layers - size + 1) * (1 - size / teacher.num_layers) / 2 for size in depths)
    largest = max(a.num_parameters for a in found)
    head = 2 * teacher.vocab_size * teacher.hidden_size

    def training(architecture: Architecture, tokens: int) -> float:
        # forward and backward of the student, the teacher's head, and the loss's second look at the student's
        return tokens * (3 * architecture.flops_per_token(seq) + head)

    search_tokens = recipe.search.training.steps * recipe.search.training.batch_rows * seq
    distill_tokens = recipe.distill.steps * recipe.distill.batch_rows * seq
    compared = min(recipe.search.heldout_rows or data.heldout_rows, data.heldout_rows)
    documents = sum(task.limit or 1000 for task in recipe.evaluate.tasks)
    at_once = max(1, min(len(found), int((os.cpu_count() or 1) / recipe.resources.cpus_per_trial)))

    def checkpoints(training: Training, runs: int) -> int:
        return 3 * MASTER_BYTES * largest * runs if training.checkpoint_every else 0

    work: list[tuple[str, str, float, int]] = [
        ("teacher", f"{teacher.num_parameters / 1e6:,.1f}M parameters", 0, teacher.num_parameters * value_bytes),
        ("data", f"{rows:,} rows of {seq} tokens", 0, rows * seq * 4),
        (
            "calibrate",
            f"{recipe.calibrate.rows} rows, {len(depths)} sizes of layer blocks",
            forward * seq * (recipe.calibrate.rows + passes * recipe.calibrate.layer_rows),
            4 * teacher.num_layers * teacher.intermediate_size,
        ),
        (
            "targets",
            f"{rows * seq:,} tokens, once through the teacher",
            forward * seq * rows,
            rows * seq * teacher.hidden_size * value_bytes,
        ),
        (
            "search",
            f"{len(found)} candidates, {search_tokens:,} tokens each",
            sum(training(a, search_tokens) + 2 * compared * seq * (a.flops_per_token(seq) + head) for a in found),
            checkpoints(recipe.search.training, at_once),
        ),
        (
            "distill",
            f"{distill_tokens:,} tokens on {recipe.resources.workers} workers",
            training(found[0], distill_tokens),
            checkpoints(recipe.distill, 1) + 2 * largest * value_bytes,
        ),
        (
            "evaluate",
            f"3 models, {', '.join(task.name for task in recipe.evaluate.tasks) or 'held-out rows only'}",
            forward * 3 * (documents * 90 + data.heldout_rows * seq),
            0,
        ),
        ("register", f"{recipe.register_as.model} as {recipe.register_as.alias}", 0, 0),
    ]
    efficiency = 0.5  # of large matrices' speed, as seen on CPUs for small models
    start_up = {"teacher": 20, "data": 15, "search": 20, "distill": 20, "evaluate": 10, "register": 2}
    return [
        Cost(stage, what, flops, size, flops / (speed * efficiency) + start_up.get(stage, 5))
        for stage, what, flops, size in work
    ]
