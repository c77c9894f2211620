"""Main memory that each stage of a recipe needs on CPUs, and whether this machine has it; and how trials fit on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from minitron.architecture import Architecture
from minitron.distill.losses.fused import GRADIENT_BYTES
from minitron.errors import InputError
from minitron.importance.estimate import BATCH_TOKENS
from minitron.logits import CHUNK_BYTES
from minitron.memory import MainMemory, forward_memory, training_memory
from minitron_platform.recipes.build import distill_config
from minitron_platform.recipes.resources import TRIALS_PER_GPU
from minitron_platform.recipes.schema import Member, Recipe

BESIDE = 1_200_000_000  # bytes of the run's own process and of Ray's while workers train
FORWARD_ROWS = 4  # of a batch that is only run forward
GPU_SHARE = 0.8  # of a GPU's memory: the rest goes to pieces too small to use, and to what else runs on it


@dataclass(frozen=True)
class ProcessMemory:
    """`processes` of a stage that run at once at least, each of which needs `each`. `key` is the recipe's for their training,
    empty for what the run's own process does alone; `workers_key` is that of their number."""

    processes: int
    each: MainMemory
    key: str = ""
    workers_key: str = ""

    @property
    def total(self) -> int:
        """Bytes of the machine while they run."""
        return self.processes * self.each.total + (BESIDE if self.key else 0)

    def __str__(self) -> str:
        """As in "2 processes of 3.1 GB: optimizer 1.1, logits 0.8, ..."; the parts in GB, the largest first."""
        parts = sorted(vars(self.each).items(), key=lambda part: -part[1])
        named = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts if size >= 5e7)
        count = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        return f"{count} of {self.each.total / 1e9:.1f} GB: {named}"


def correction_memory(recipe: Recipe, teacher: Architecture, value_bytes: int, workers: int) -> ProcessMemory | None:
    """Training the teacher on the recipe's text; None without a correction."""
    correction = recipe.correction()
    if recipe.correct is None or correction is None:
        return None
    each = training_memory(teacher, distill_config(correction), recipe.data.seq_length, value_bytes, workers=workers)
    if recipe.correct.method != "full":
        each = replace(each, optimizer=0, gradients=0, checkpoint=0)
    return ProcessMemory(workers, each, "correct.training", "resources.workers")


def targets_memory(recipe: Recipe, teacher: Architecture, value_bytes: int) -> ProcessMemory:
    """Running the teacher forward."""
    return ProcessMemory(1, forward_memory([teacher], value_bytes, FORWARD_ROWS * recipe.data.seq_length))


def calibration_memory(recipe: Recipe, teacher: Architecture, value_bytes: int) -> ProcessMemory:
    """Scoring a model that is the teacher, or smaller."""
    tokens, streams = max(BATCH_TOKENS, recipe.data.seq_length), teacher.num_layers + 1
    return ProcessMemory(1, forward_memory([teacher], value_bytes, tokens, logits=2, streams=streams))


def search_memory(
    recipe: Recipe, teacher: Architecture, largest: Architecture, value_bytes: int, workers: int
) -> ProcessMemory:
    """One trial; more run at once where there is memory for them, because Ray is told what each takes."""
    each = trial_memory(recipe, teacher, largest, value_bytes)
    return ProcessMemory(workers, each, "search.training", "resources.workers_per_trial")


def distillation_memory(
    recipe: Recipe,
    member: Member,
    teacher: Architecture,
    largest: Architecture,
    value_bytes: int,
    *,
    workers: int,
    live_teacher: bool,
) -> ProcessMemory:
    """The full distillation of one of the family; `live_teacher` says that the teacher runs beside the student."""
    training = recipe.distillation(member)
    each = training_memory(
        largest,
        distill_config(training),
        recipe.data.seq_length,
        value_bytes,
        teacher=teacher,
        whole_teacher=live_teacher,
        measured=bool(training.evaluate_every),
        workers=workers,
    )
    key = f"{recipe.key(member)}.distill" if member.distill else "distill"
    return ProcessMemory(workers, each, key, "resources.workers")


def evaluation_memory(recipe: Recipe, teacher: Architecture, largest: Architecture, value_bytes: int) -> ProcessMemory:
    """Teacher, pruned and distilled student together."""
    tokens = max(FORWARD_ROWS, recipe.evaluate.batch_rows) * recipe.data.seq_length
    return ProcessMemory(1, forward_memory([teacher, largest, largest], value_bytes, tokens, logits=2))


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


def check_memory(stage: str, memory: ProcessMemory, available: int) -> None:
    """Raise InputError if `stage`, as messages name it, needs more than the `available` bytes of main memory."""
    if memory.total <= available:
        return
    problem = (
        f"{stage}: needs about {memory.total / 1e9:.1f} GB of main memory ({memory}), "
        f"and this machine has {available / 1e9:.1f} GB"
    )
    less = (
        f"lower {memory.key}.micro_batch_rows or {memory.workers_key}, set {memory.key}.activation_checkpointing=full or "
        f"{memory.key}.shard=true"
    )
    raise InputError(problem, f"{less if memory.key else 'use a smaller teacher'}, or use a machine with more memory")


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
