"""What the teacher costs, stored once or run in the distillation itself; and what the two cannot do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from minitron.architecture import Architecture
from minitron.distill import Losses
from minitron.distill.teacher.stored import stored_bytes
from minitron.errors import InputError, StorageError
from minitron_platform.recipes.build import distillation_losses
from minitron_platform.recipes.schema import Recipe

MODES = ("stored", "online")
ROW_BYTES = 4  # of a token


@dataclass(frozen=True)
class TeacherCost:
    """Work and disk of a teacher: rows that are stored of it, FLOPs to make them, FLOPs of it in the distillations, bytes."""

    rows: int
    stored_flops: float
    online_flops: float
    bytes: int


def teacher_cost(
    recipe: Recipe, teacher: Architecture, losses: Mapping[str, Losses], value_bytes: int, mode: str
) -> TeacherCost:
    """The cost in one of `MODES`, of the recipe's other keys as they are; `losses` by model of the family."""
    data, search, seq = recipe.data, recipe.search.training, recipe.data.seq_length
    train = data.train_rows
    if mode == "online":
        train = min(train, search.steps * search.batch_rows)
    tokens = 0
    for member in recipe.family:
        training = recipe.distillation(member)
        if runs_beside(losses[member.model], mode):
            tokens += training.steps * training.batch_rows * seq
    forward = teacher.flops_per_token(seq)
    return TeacherCost(
        rows=train + data.heldout_rows,
        stored_flops=float(forward * seq * (train + data.heldout_rows)),
        online_flops=float(forward * tokens),
        bytes=stored_bytes(train, seq, teacher.hidden_size, value_bytes, recipe.targets.top_k)
        + stored_bytes(data.heldout_rows, seq, teacher.hidden_size, value_bytes),
    )


def runs_beside(losses: Losses, mode: str) -> bool:
    """Whether a distillation in one of `MODES` runs the teacher on every batch."""
    return losses.needs_live_teacher or (mode == "online" and losses.needs_teacher)


def check_targets(recipe: Recipe, teacher: Architecture, found: dict[str, list[Architecture]]) -> None:
    """Refuse likeliest tokens that the losses cannot use. Raises InputError."""
    k, losses = recipe.targets.top_k, recipe.losses
    if not k:
        return
    if k > teacher.vocab_size:
        raise InputError(f"targets.top_k: {k} of {teacher.vocab_size} tokens", f"use at most {teacher.vocab_size}")
    if losses.logits != "forward_kl":
        raise InputError(
            f"targets.top_k: {k} with losses.logits: {losses.logits}, which needs the whole distribution",
            "use losses.logits=forward_kl, or leave targets.top_k out",
        )
    if losses.top_k > k:
        raise InputError(
            f"losses.top_k: {losses.top_k} with targets.top_k: {k}, which is all that is stored",
            f"use losses.top_k of at most {k}, or leave it out, or store {losses.top_k}",
        )
    if recipe.targets.mode == "online":
        return
    for depth in sorted({shape.num_layers for shapes in found.values() for shape in shapes}):
        if distillation_losses(recipe, replace(teacher, num_layers=depth), teacher)[0].needs_live_teacher:
            raise InputError(
                f"targets.top_k: {k}, and the losses of a model with {depth} of {teacher.num_layers} layers "
                "compare more of the teacher than its likeliest tokens",
                "use losses.hidden=[] without embedding, attention and mlp_input, or targets.mode=online",
            )


def too_little_room(
    recipe: Recipe,
    teacher: Architecture,
    costs: dict[str, TeacherCost],
    value_bytes: int,
    place: str,
    needed: int,
    free: int,
) -> StorageError:
    """The error for a run that needs more bytes than are free; `costs` by mode of what is to be stored, empty where it is
    stored already."""
    problem = f"{place}: the run needs about {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free"
    remedies = ["free some space, choose another place with --storage"]
    data, targets = recipe.data, recipe.targets
    if costs:
        row = stored_bytes(1, data.seq_length, teacher.hidden_size, value_bytes, targets.top_k)
        fit = max(0, data.train_rows - math.ceil((needed - free) / (row + ROW_BYTES * data.seq_length)))
        problem += f": {fit:,} of {data.train_rows:,} training rows fit, with what is stored of the teacher"
        if targets.mode == "stored" and costs["stored"].bytes - costs["online"].bytes >= needed - free:
            remedies.append("run the teacher in the distillation itself with targets.mode=online")
        remedies.append(f"lower data.train_rows to {fit}" if fit else "lower data.train_rows")
    else:
        remedies.append("lower data.train_rows")
    return StorageError(problem, ", ".join(remedies[:-1]) + f", or {remedies[-1]}")
