"""From a recipe's sections to the method's settings: the one place where both are known.

A section that names its fields as the method does is handed over whole, so that a new field is said in two places: where it
is a setting of the method, and where it is a key of the recipe. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from minitron.architecture import Architecture
from minitron.data import DocumentTokens, TextSource
from minitron.distill import DistillConfig, Losses, default_losses
from minitron.distill.losses import mapped_layers
from minitron.errors import prefixed
from minitron.evaluation import Task
from minitron.importance import LayerScoring
from minitron.pruning.source import PruningSource, Recalibration
from minitron_platform.recipes import schema
from minitron_search.halving import Halving
from minitron_search.limits import Limits

if TYPE_CHECKING:
    from minitron_search.benchmarks import Benchmarks

# What compares more of the teacher than its logits, which is not stored.
INTERMEDIATE = {"hidden", "hidden_loss", "embedding", "attention", "mlp_input", "alpha"}


def text_source(data: schema.Data) -> TextSource:
    return TextSource(**data.model_dump(include={field.name for field in fields(TextSource)}))


def document_tokens(data: schema.Data, tokens: DocumentTokens) -> DocumentTokens:
    """The tokens around a document: those of the teacher's tokenizer, `tokens`, as `data.add_bos` changes them.

    Raises InputError for a BOS token that the tokenizer does not have."""
    with prefixed("data."):
        return tokens.chosen(data.bos)


def lm_eval_tasks(tasks: Iterable[schema.Task]) -> tuple[Task, ...]:
    return tuple(Task(**task.model_dump()) for task in tasks)


def layer_scoring(calibrate: schema.Calibrate, num_layers: int, depths: Collection[int]) -> LayerScoring:
    """How to score the layers of a model that has `num_layers` of them and may keep as many as any of `depths` says."""
    removed = sorted({num_layers - int(depth) for depth in depths if depth < num_layers})
    if not removed:
        return LayerScoring()
    scoring = LayerScoring(
        metric=calibrate.layers,
        rows=calibrate.layer_rows,
        task=lm_eval_tasks([calibrate.task])[0] if calibrate.task else None,
    )
    if calibrate.depth == "iterative":
        return replace(scoring, iterative=1, keep=num_layers - removed[-1])
    return replace(scoring, sizes=(1,) if calibrate.depth == "scattered" else tuple(removed))


def layer_metric(calibrate: schema.Calibrate) -> str:
    """What layers are ranked by, under its name in the scores."""
    return f"task:{calibrate.task.name}" if calibrate.task else calibrate.layers


def pruning_source(calibrate: schema.Calibrate, *, folder: str, scores: str, dtype: str, rows: str) -> PruningSource:
    """The checkpoint `folder` to prune by its importance `scores`; `rows` is the folder of packed rows on which it is scored
    anew where pruning goes in steps."""
    return PruningSource(
        folder=folder,
        scores=scores,
        dtype=dtype,
        depth=calibrate.depth,
        metric=layer_metric(calibrate),
        merge_heads=calibrate.merge_heads,
        recalibration=recalibration(calibrate, rows) if calibrate.steps > 1 else None,
    )


def recalibration(calibrate: schema.Calibrate, rows: str) -> Recalibration:
    return Recalibration(
        steps=calibrate.steps,
        rows=rows,
        num_rows=calibrate.rows,
        layer_metric=calibrate.layers if calibrate.layers in ("loss", "logit_error") else "cosine",
        layer_rows=calibrate.layer_rows,
        batch_aggregation=calibrate.batch_aggregation,
        sequence_aggregation=calibrate.sequence_aggregation,
        neurons=calibrate.neurons,
    )


def distill_config(training: schema.Training) -> DistillConfig:
    # benchmarks during a training are run around the loop, not by it
    return DistillConfig(**training.model_dump(exclude={"evaluate_tasks_every"}))


def logit_losses(recipe: schema.Recipe) -> Losses:
    """The part of `losses` that is about logits: what candidates are compared on, from the stored teacher.

    Raises InputError for values that make no objective."""
    with prefixed("losses."):
        return Losses(**recipe.losses.model_dump(exclude=INTERMEDIATE) | {"top_k": _top_k(recipe)})


def distillation_losses(recipe: schema.Recipe, student: Architecture, teacher: Architecture) -> tuple[Losses, str]:
    """All losses for one student, and a sentence on why.

    Raises InputError for values that make no objective, and for layers that the student or the teacher does not have."""
    settings, reason = recipe.losses.model_dump(), "as the recipe says"
    if recipe.losses.hidden == "auto":
        default, reason = default_losses(student, teacher)
        settings |= {"hidden": default.hidden, "embedding": recipe.losses.embedding or default.embedding}
    with prefixed("losses."):
        losses = Losses(**settings | {"top_k": _top_k(recipe)})
        for layers in (*losses.hidden, *losses.attention, *losses.mlp_input):
            mapped_layers(layers, teacher.num_layers, student.num_layers)
    return losses, reason


def _top_k(recipe: schema.Recipe) -> int:
    """Top-k tokens that the losses use: those of `losses`, or all that are stored of the teacher."""
    return recipe.losses.top_k or recipe.targets.top_k


def limits(recipe: schema.Recipe, member: schema.Member) -> Limits | None:
    """What a candidate for `member` may need at most; None for no limit."""
    if member.limits is None:
        return None
    return Limits(**member.limits.model_dump() | {"context": member.limits.context or recipe.data.seq_length})


def halving(search: schema.Search) -> Halving | None:
    return Halving(**search.halving.model_dump()) if search.halving else None


def benchmarks(recipe: schema.Recipe, tokenizer: str) -> Benchmarks | None:
    """The benchmarks of the best candidates, with the tokenizer of the checkpoint folder `tokenizer`; None for none."""
    from minitron_search.benchmarks import Benchmarks

    evaluate = recipe.search.evaluate
    if evaluate is None:
        return None
    return Benchmarks(
        tasks=lm_eval_tasks(evaluate.tasks),
        keep=evaluate.keep,
        tokenizer=tokenizer,
        batch_rows=recipe.evaluate.batch_rows,
        add_bos=recipe.data.bos,
    )
