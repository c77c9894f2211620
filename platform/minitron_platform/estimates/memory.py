"""Main memory that each stage of a recipe needs on CPUs, and whether this machine has it; and how trials fit on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minitron.architecture import Architecture
from minitron.distill import Losses
from minitron.distill.losses.fused import GRADIENT_BYTES
from minitron.errors import InputError
from minitron.importance.estimate import BATCH_TOKENS
from minitron.logits import CHUNK_BYTES
from minitron.memory import MainMemory, forward_memory, training_memory
from minitron_platform.estimates.teacher import runs_beside
from minitron_platform.recipes.build import distill_config
from minitron_platform.recipes.resources import TRIALS_PER_GPU, ResolvedResources
from minitron_platform.recipes.schema import Member, Recipe

BESIDE = 1_200_000_000  # bytes of the run's own process and of Ray's while workers train
FORWARD_ROWS = 4  # of a batch that is only run forward
GPU_SHARE = 0.8  # of a GPU's memory: the rest goes to pieces too small to use, and to what else runs on it


@dataclass(frozen=True)
class StageMemory:
    """`processes` of a stage that run at once at least, each of which needs `each`. `key` is the recipe's for their training,
    empty for what the run's own process does alone."""

    stage: str
    model: str
    processes: int
    each: MainMemory
    key: str = ""

    @property
    def total(self) -> int:
        """Bytes of the machine while this stage runs."""
        return self.processes * self.each.total + (BESIDE if self.key else 0)


def stage_memories(
    recipe: Recipe,
    resources: ResolvedResources,
    teacher: Architecture,
    found: dict[str, list[Architecture]],
    losses: Mapping[str, Losses],
    value_bytes: int,
) -> list[StageMemory]:
    """Of every stage that runs models, with the largest of each model's candidates `found` and its `losses`; none where models
    run on GPUs."""
    if torch.cuda.is_available() or resources.gpus_per_trial or resources.gpus_per_worker:
        return []
    seq = recipe.data.seq_length
    forward = forward_memory([teacher], value_bytes, FORWARD_ROWS * seq)
    stages = [StageMemory("targets", "", 1, forward)]
    if recipe.correct and (correction := recipe.correction()):
        workers = resources.workers
        each = training_memory(teacher, distill_config(correction), seq, value_bytes, workers=workers)
        if recipe.correct.method != "full":
            each = replace(each, optimizer=0, gradients=0, checkpoint=0)
        stages.insert(0, StageMemory("correct", "", workers, each, "correct.training"))
    for member in recipe.family:
        stages += _member_memories(
            recipe, resources, member, teacher, found[member.model], losses[member.model], value_bytes
        )
    return stages


def _member_memories(
    recipe: Recipe,
    resources: ResolvedResources,
    member: Member,
    teacher: Architecture,
    shapes: list[Architecture],
    losses: Losses,
    value_bytes: int,
) -> list[StageMemory]:
    seq, largest = recipe.data.seq_length, max(shapes, key=lambda a: a.num_parameters)
    streams = teacher.num_layers + 1  # the model that is scored is the teacher, or smaller
    scoring = forward_memory([teacher], value_bytes, max(BATCH_TOKENS, seq), logits=2, streams=streams)
    rows = max(FORWARD_ROWS, recipe.evaluate.batch_rows)
    evaluation = forward_memory([teacher, largest, largest], value_bytes, rows * seq, logits=2)
    training = recipe.distillation(member)
    distillation = training_memory(
        largest,
        distill_config(training),
        seq,
        value_bytes,
        teacher=teacher,
        whole_teacher=runs_beside(losses, recipe.targets.mode),
        measured=bool(training.evaluate_every),
        workers=resources.workers,
    )
    trial = trial_memory(recipe, teacher, largest, value_bytes)
    place = f"{recipe.key(member)}.distill" if member.distill else "distill"
    return [
        StageMemory("calibrate", member.model, 1, scoring),
        # more at once where there is memory for them: Ray is told what each takes
        StageMemory("search", member.model, resources.workers_per_trial, trial, "search.training"),
        StageMemory("distill", member.model, resources.workers, distillation, place),
        StageMemory("evaluate", member.model, 1, evaluation),
    ]


def trial_memory(recipe: Recipe, teacher: Architecture, largest: Architecture, value_bytes: int) -> MainMemory:
    """Of one worker of a trial, which keeps what candidates are cut from, at most the teacher, from one to the next."""
    return training_memory(
        largest,
        distill_config(recipe.search.training),
        recipe.data.seq_length,
        value_bytes,
        teacher=teacher,
        whole_teacher=True,
        measured=True,
        workers=recipe.resources.workers_per_trial,
    )


def are_trials_small(recipe: Recipe, teacher: Architecture, value_bytes: int, gpu_bytes: int) -> bool:
    """Whether TRIALS_PER_GPU trials fit on a GPU together, whatever the candidates: none is larger than the teacher."""
    each = replace(trial_memory(recipe, teacher, teacher, value_bytes), checkpoint=0)  # whose copy is in main memory
    return TRIALS_PER_GPU * (each.total + 2 * CHUNK_BYTES["cuda"] + GRADIENT_BYTES) <= GPU_SHARE * gpu_bytes


def check_memory(stages: Iterable[StageMemory], there: int) -> None:
    """Raise InputError for a stage that needs more than the `there` bytes of main memory."""
    for stage in stages:
        if stage.total <= there:
            continue
        model = f" of {stage.model}" if stage.model else ""
        problem = (
            f"{stage.stage}{model}: needs about {stage.total / 1e9:.1f} GB of main memory ({memory_text(stage)}), "
            f"and this machine has {there / 1e9:.1f} GB"
        )
        workers = "workers_per_trial" if stage.stage == "search" else "workers"
        less = (
            f"lower {stage.key}.micro_batch_rows or resources.{workers}, set {stage.key}.activation_checkpointing=full or "
            f"{stage.key}.shard=true"
        )
        raise InputError(
            problem, f"{less if stage.key else 'use a smaller teacher'}, or use a machine with more memory"
        )


def memory_text(stage: StageMemory) -> str:
    """As in "2 processes of 3.1 GB: optimizer 1.1, logits 0.8, ..."; the parts in GB, the largest first."""
    parts = sorted(vars(stage.each).items(), key=lambda part: -part[1])
    named = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts if size >= 5e7)
    count = f"{stage.processes} process{'es' if stage.processes > 1 else ''}"
    return f"{count} of {stage.each.total / 1e9:.1f} GB: {named}"


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that this machine has, or the container, job or service whose limit this process is under.

    root: where /proc and /sys are."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for group in _memory_groups(root):
        for name in ("memory.max", "memory.limit_in_bytes"):  # cgroup 2, cgroup 1
            file = group / name
            if file.exists() and (text := file.read_text().strip()).isdigit():
                limits.append(int(text))
    return min(limits)


def _memory_groups(root: Path) -> Iterator[Path]:
    """The folders of this process's control groups, and of those around them, whose limits hold for it as well."""
    groups = root / "proc/self/cgroup"  # lines of number:controllers:path; without controllers in cgroup 2
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        inner = top / path.lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(top))
