"""From a recipe's `losses` to what a distillation minimises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from minitron.architecture import Architecture
from minitron.distill import Losses, default_losses
from minitron.distill.losses import mapped_layers
from minitron.errors import InputError
from minitron_platform.recipes.schema import Recipe


@contextmanager
def _named() -> Iterator[None]:
    """Errors name the recipe's key."""
    try:
        yield
    except InputError as error:
        raise InputError(f"losses.{error.problem}", error.remedy) from error


def logit_losses(recipe: Recipe) -> Losses:
    """The part that is about logits: what candidates are compared on, from the stored teacher."""
    settings = recipe.losses
    with _named():
        return Losses(
            logits=settings.logits,
            temperature=settings.temperature,
            cross_entropy=settings.cross_entropy,
            top_k=_top_k(recipe),
        )


def _top_k(recipe: Recipe) -> int:
    """Of how many likeliest tokens the losses know; what is stored of the teacher may be no more."""
    return recipe.losses.top_k or recipe.targets.top_k


def distillation_losses(recipe: Recipe, student: Architecture, teacher: Architecture) -> tuple[Losses, str]:
    """All of it for one student, and a sentence that says what was chosen. Raises InputError for what cannot be."""
    settings = recipe.losses
    hidden, embedding, said = settings.hidden, settings.embedding, "as the recipe says"
    if hidden == "auto":
        default, said = default_losses(student, teacher)
        hidden, embedding = list(default.hidden), embedding or default.embedding
    with _named():
        losses = Losses(
            logits=settings.logits,
            temperature=settings.temperature,
            cross_entropy=settings.cross_entropy,
            top_k=_top_k(recipe),
            hidden=tuple(hidden),
            hidden_loss=settings.hidden_loss,
            embedding=embedding,
            attention=tuple(settings.attention),
            mlp_input=tuple(settings.mlp_input),
            alpha=settings.alpha,
        )
        for layers in (*losses.hidden, *losses.attention, *losses.mlp_input):
            mapped_layers(layers, teacher.num_layers, student.num_layers)
    return losses, said
