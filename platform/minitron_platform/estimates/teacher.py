"""Cost of the teacher in either value of `targets.mode`, and the settings of `targets` that the losses cannot use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from minitron.architecture import Architecture
from minitron.distill import Losses
from minitron.distill.teacher.stored import stored_bytes
from minitron.errors import InputError
from minitron_platform.recipes.build import distillation_losses
from minitron_platform.recipes.schema import Recipe

MODES = ("stored", "online")
TOKEN_BYTES = 4  # of a token ID in the packed rows


@dataclass(frozen=True)
class TeacherCost:
    """Compute and disk that the teacher costs in one of `MODES`."""

    rows: int
    """Rows whose teacher outputs are stored."""
    stored_flops: float
    """FLOPs to compute what is stored."""
    online_flops: float
    """FLOPs of the teacher's forward passes during the full distillations."""
    bytes: int
    """Size of what is stored."""


def teacher_cost(
    recipe: Recipe, teacher: Architecture, losses: Mapping[str, Losses], value_bytes: int, mode: str
) -> TeacherCost:
    """Cost of `teacher` if the recipe's `targets.mode` were `mode`, one of `MODES`.

    losses: by model of the family. value_bytes: bytes of a stored value.
    """
    seq_length = recipe.data.seq_length
    search = recipe.search.training
    train_rows = recipe.data.train_rows
    heldout_rows = recipe.data.heldout_rows
    if mode == "online":
        train_rows = min(train_rows, search.steps * search.batch_rows)
    online_tokens = 0
    for member in recipe.family:
        training = recipe.distillation(member)
        if runs_live_teacher(losses[member.model], mode):
            online_tokens += training.steps * training.batch_rows * seq_length
    forward = teacher.flops_per_token(seq_length)
    return TeacherCost(
        rows=train_rows + heldout_rows,
        stored_flops=float(forward * seq_length * (train_rows + heldout_rows)),
        online_flops=float(forward * online_tokens),
        bytes=stored_bytes(train_rows, seq_length, teacher.hidden_size, value_bytes, recipe.targets.top_k)
        + stored_bytes(heldout_rows, seq_length, teacher.hidden_size, value_bytes),
    )


def runs_live_teacher(losses: Losses, mode: str) -> bool:
    """Whether a distillation with `losses` runs the teacher on every batch when `targets.mode` is `mode`."""
    return losses.needs_live_teacher or (mode == "online" and losses.needs_teacher)


def check_targets(recipe: Recipe, teacher: Architecture, candidates: Mapping[str, list[Architecture]]) -> None:
    """Raise InputError for a `targets.top_k` that is too large or that the losses of a candidate cannot use.

    candidates: by model of the family.
    """
    top_k = recipe.targets.top_k
    losses = recipe.losses
    if not top_k:
        return
    if top_k > teacher.vocab_size:
        raise InputError(
            f"targets.top_k: {top_k} is more than the teacher's vocabulary of {teacher.vocab_size} tokens",
            f"use at most {teacher.vocab_size}",
        )
    if losses.logits != "forward_kl":
        raise InputError(
            f"targets.top_k: {top_k} does not work with losses.logits: {losses.logits}, which needs the whole distribution",
            "use losses.logits=forward_kl, or leave targets.top_k out",
        )
    if losses.top_k > top_k:
        raise InputError(
            f"losses.top_k: {losses.top_k} is more than targets.top_k: {top_k}, the number of tokens that are stored",
            f"use losses.top_k of at most {top_k}, or leave it out, or raise targets.top_k to {losses.top_k}",
        )
    if recipe.targets.mode == "online":
        return
    for depth in sorted({shape.num_layers for shapes in candidates.values() for shape in shapes}):
        if distillation_losses(recipe, replace(teacher, num_layers=depth), teacher)[0].needs_live_teacher:
            raise InputError(
                f"targets.top_k: {top_k} stores only top-k logits, but the losses of a model with {depth} of "
                f"{teacher.num_layers} layers also compare the teacher's intermediate states",
                "use losses.hidden=[] without embedding, attention and mlp_input, or targets.mode=online",
            )
