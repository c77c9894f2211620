"""Main memory that each stage needs on CPUs, and the check against what the machine has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from minitron.architecture import Architecture
from minitron.distill.teacher.shard_writing import SHARD_BYTES
from minitron.distill.teacher.stored import stored_bytes
from minitron.distill.trainable import trained_parameters
from minitron.errors import InputError
from minitron.evaluation.batches import CPU_ROWS
from minitron.importance.estimate import BATCH_TOKENS
from minitron.memory import MainMemory, conversion_memory, forward_memory, training_memory
from minitron_platform.recipes.build import distill_config
from minitron_platform.recipes.schema import Correct, Member, Recipe, WorkerRange

DRIVER_BYTES = 1_200_000_000  # of the driver and of Ray's own processes while workers train
FORWARD_ROWS = 4  # rows of a batch in a forward pass without gradients


@dataclass(frozen=True)
class ProcessMemory:
    """Main memory of the processes of a stage."""

    processes: int
    """Number of processes; a search runs more at once if there is memory for them."""
    each: MainMemory
    """Memory of one process."""
    key: str = ""
    """Recipe key of the training that the processes do; empty for work in the driver alone."""
    workers_key: str = ""
    """Recipe key of the number of processes; empty for work in the driver alone."""

    @property
    def total(self) -> int:
        """Bytes of all processes of the stage, and of the driver beside them."""
        return self.processes * self.each.total + (DRIVER_BYTES if self.key else 0)

    def __str__(self) -> str:
        """For example "2 processes of 3.1 GB: optimizer 1.1, logits 0.8"; the parts in GB, the largest first."""
        parts = sorted(vars(self.each).items(), key=lambda part: -part[1])
        named = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts if size >= 5e7)
        count = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        return f"{count} of {self.each.total / 1e9:.1f} GB: {named}"


def teacher_memory(teacher: Architecture, value_bytes: int) -> ProcessMemory:
    """Memory of the teacher's conversion."""
    return ProcessMemory(1, conversion_memory(teacher, value_bytes))


def probe_memory(teacher: Architecture, value_bytes: int, tokens: int) -> ProcessMemory:
    """Memory of measuring the teacher, with and without a BOS token, on `tokens` tokens of the text."""
    return ProcessMemory(1, forward_memory([teacher], value_bytes, tokens))


def correction_memory(recipe: Recipe, teacher: Architecture, value_bytes: int, workers: int) -> ProcessMemory | None:
    """Memory of the teacher's correction; None if the recipe has none."""
    correction = recipe.correction()
    if recipe.correct is None or correction is None:
        return None
    each = training_memory(teacher, distill_config(correction), recipe.data.seq_length, value_bytes, workers=workers)
    share = corrected_share(recipe.correct, teacher)
    each = replace(
        each,
        optimizer=int(share * each.optimizer),
        gradients=int(share * each.gradients),
        checkpoint=int(share * each.checkpoint),
    )
    return ProcessMemory(workers, each, recipe.correction_key, "resources.workers")


def corrected_share(correct: Correct, teacher: Architecture) -> float:
    """Share of the teacher's parameters that its correction trains; adapters count as a part of these."""
    return trained_parameters(teacher, correct.method, lora_rank=correct.lora_rank) / teacher.num_parameters


def targets_memory(recipe: Recipe, teacher: Architecture, value_bytes: int) -> ProcessMemory:
    """Memory of the teacher's forward pass over all rows, with two shards of their hidden states."""
    each = forward_memory([teacher], value_bytes, FORWARD_ROWS * recipe.data.seq_length)
    stored = stored_bytes(recipe.data.train_rows, recipe.data.seq_length, teacher.hidden_size, value_bytes)
    return ProcessMemory(1, replace(each, rows=min(2 * SHARD_BYTES, stored)))


def calibration_memory(recipe: Recipe, teacher: Architecture, value_bytes: int) -> ProcessMemory:
    """Memory of scoring the teacher, the largest model that is ever scored."""
    tokens = max(BATCH_TOKENS, recipe.data.seq_length)
    hidden_states = teacher.num_layers + 1
    return ProcessMemory(1, forward_memory([teacher], value_bytes, tokens, logits=2, streams=hidden_states))


def search_memory(
    recipe: Recipe, teacher: Architecture, largest: Architecture, value_bytes: int, workers: int
) -> ProcessMemory:
    """Memory of one trial. More run at once only if there is memory for them, because Ray is told what each takes."""
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
    """Memory of the full distillation of `member`.

    largest: its largest candidate. live_teacher: whether the workers load the teacher too.
    """
    training = recipe.distillation(member)
    each = training_memory(
        largest,
        distill_config(training),
        recipe.data.seq_length,
        value_bytes,
        teacher=teacher,
        whole_teacher=live_teacher,
        measured=bool(training.evaluate_every or training.evaluate_tasks_every),
        workers=workers,
    )
    return ProcessMemory(workers, each, recipe.distillation_key(member), "resources.workers")


def evaluation_memory(recipe: Recipe, teacher: Architecture, largest: Architecture, value_bytes: int) -> ProcessMemory:
    """Memory of the evaluation, which times the teacher and a student in turns."""
    given = recipe.evaluate.batch_rows
    tokens = max(FORWARD_ROWS, CPU_ROWS if given == "auto" else given) * recipe.data.seq_length
    return ProcessMemory(1, forward_memory([teacher, largest], value_bytes, tokens, logits=2))


def trial_memory(recipe: Recipe, teacher: Architecture, largest: Architecture, value_bytes: int) -> MainMemory:
    """Memory of one worker of a trial. It keeps the model that candidates are pruned from, at most as large as the teacher,
    in memory from one trial to the next."""
    workers = recipe.resources.workers_per_trial
    return training_memory(
        largest,
        distill_config(recipe.search.training),
        recipe.data.seq_length,
        value_bytes,
        teacher=teacher,
        whole_teacher=True,
        measured=True,
        workers=workers.min if isinstance(workers, WorkerRange) else workers,
    )


def check_memory(
    stage: str, memory: ProcessMemory, available: int, changed: Callable[[list[str]], ProcessMemory | None]
) -> None:
    """Raise InputError if `stage`, by its name for messages, needs more than the `available` bytes of main memory.

    changed: its memory with changes of the recipe as KEY=VALUE; None if they contradict the recipe.
    """
    if memory.total <= available:
        return
    problem = (
        f"{stage}: needs about {memory.total / 1e9:.1f} GB of main memory ({memory}), "
        f"and this machine has {available / 1e9:.1f} GB"
    )
    remedy = "use a smaller teacher"
    if memory.key:
        for changes in _changes(memory):
            smaller = changed(changes)
            if smaller and smaller.total <= available:
                remedy = f"set {' and '.join(changes)}, which takes {smaller.total / 1e9:.1f} GB"
                break
    raise InputError(problem, f"{remedy}, or use a machine with more memory")


def _changes(memory: ProcessMemory) -> Iterator[list[str]]:
    """Changes of the recipe that take less memory, the fewest first, and of as many those that cost the least time."""
    changes = [
        f"{memory.key}.micro_batch_rows=1",
        f"{memory.key}.activation_checkpointing=full",
        f"{memory.key}.shard=true",
        f"{memory.workers_key}=1",
    ]
    for count in range(1, len(changes)):
        yield from map(list, combinations(changes, count))


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process may use: the machine's, or the limit of its container, job or service if that
    is lower.

    root: folder that has /proc and /sys.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for group in _memory_groups(root):
        for name in ("memory.max", "memory.limit_in_bytes"):  # cgroup 2, cgroup 1
            file = group / name
            if file.exists() and (text := file.read_text().strip()).isdigit():
                limits.append(int(text))
    return min(limits)


def _memory_groups(root: Path) -> Iterator[Path]:
    """Folders of this process's control groups and of their parents, whose limits apply to it too."""
    groups = root / "proc/self/cgroup"  # lines of "number:controllers:path"; cgroup 2 names no controllers
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        inner = top / path.lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(top))
