"""The only module that turns a recipe's sections into settings of `minitron` and `minitron_search`.

A section whose fields have the names of the method's fields is passed on as a whole. A new field is therefore added twice,
to the method's settings and to the recipe's section; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from minitron.architecture import Architecture
from minitron.attention import chosen_kernel
from minitron.data import DocumentTokens, TextSource
from minitron.device import device
from minitron.distill import DistillConfig, Losses, default_losses
from minitron.distill.config import ADAMW_8BIT
from minitron.distill.fitting import CHOSEN
from minitron.distill.losses import mapped_layers
from minitron.errors import InputError
from minitron.evaluation import Task
from minitron.importance import LayerScoring
from minitron.pruning.source import PruningSource, Recalibration
from minitron_platform.recipes import schema
from minitron_platform.recipes.keys import named_by_key
from minitron_platform.recipes.paths import absolute
from minitron_search.halving import Halving
from minitron_search.limits import Limits

if TYPE_CHECKING:
    from minitron_search.benchmarks import Benchmarks

HELDOUT = "data.heldout"  # the recipe key of the held-out text's own source
# Fields of `losses` that need intermediate states of the teacher, which are not stored.
INTERMEDIATE = {"hidden", "hidden_loss", "embedding", "attention", "mlp_input", "alpha"}


def text_sources(data: schema.Data) -> dict[str, TextSource]:
    """The texts to pack, by their recipe keys. Raises InputError for keys of one that contradict each other."""
    sections: dict[str, schema.WeightedText | schema.Data] = {"data": data}
    if data.sources:
        sections = {f"data.sources.{number}": source for number, source in enumerate(data.sources)}
    return {key: _text_source(key, section) for key, section in sections.items()}


def heldout_source(data: schema.Data) -> TextSource | None:
    """The text of the held-out rows; None if they are taken from the text of the training rows. Raises as `text_sources`."""
    return _text_source(HELDOUT, data.heldout) if data.heldout else None


def all_text_sources(data: schema.Data) -> dict[str, TextSource]:
    """`text_sources` and `heldout_source`."""
    heldout = heldout_source(data)
    return text_sources(data) | ({HELDOUT: heldout} if heldout else {})


def has_chats(data: schema.Data) -> bool:
    """Whether any of the text is chats."""
    return any(source.messages for source in all_text_sources(data).values())


def _text_source(key: str, section: schema.HeldoutText | schema.WeightedText | schema.Data) -> TextSource:
    with named_by_key(key):
        return TextSource(**section.model_dump(include={field.name for field in fields(TextSource)}))


def data_values(data: schema.Data) -> dict[str, Any]:
    """The section's values for fingerprints. Keys that were added later are left out unless they are used, so that what was
    finished before keeps its fingerprint."""
    first = {"path", "key", "name", "split", "revision", "kind", "seq_length", "train_rows", "heldout_rows"}
    values = data.model_dump(include={*first, "heldout_fraction"})
    return values | data.model_dump(exclude=set(values), exclude_defaults=True)


def document_tokens(data: schema.Data, tokens: DocumentTokens) -> DocumentTokens:
    """The special tokens around each document: `tokens`, those of the teacher's tokenizer, changed as `data.add_bos` says.

    Raises InputError if `data.add_bos` is true and the tokenizer has no BOS token.
    """
    with named_by_key("data"):
        return tokens.chosen(data.bos)


def separates_documents(recipe: schema.Recipe, on_gpus: bool | None = None) -> bool:
    """Whether attention is restricted to the tokens of the same document; `auto`: if models run on GPUs, where that is
    faster, and none of the text is chats, in which most templates end every message as a document ends.

    on_gpus: whether a cluster's workers run on GPUs; None if models run on this machine's device.
    """
    if recipe.data.separate_documents != "auto":
        return recipe.data.separate_documents
    if has_chats(recipe.data):
        return False
    if 0 in (recipe.resources.gpus_per_trial, recipe.resources.gpus_per_worker):
        return False
    return chosen_kernel(device() if on_gpus is None else torch.device("cuda" if on_gpus else "cpu")) == "flex"


def lm_eval_tasks(
    tasks: Iterable[schema.Task], allow_code: bool = False, folder: str | None = None
) -> tuple[Task, ...]:
    """The benchmarks to run. allow_code: the recipe's `evaluate.allow_code`. folder: its `evaluate.task_folder`.

    The first of those with one name keeps it for its score; the others are named by their number of examples, too.
    """
    made: list[Task] = []
    given: list[schema.Task] = []
    for task in tasks:
        if task in given:
            raise InputError(
                f"task {task.name!r} is given twice with num_fewshot {task.num_fewshot}",
                "leave one out, or give it another num_fewshot",
            )
        given.append(task)
        repeated = any(other.name == task.name for other in made)
        label = f"{task.name}_{task.num_fewshot}shot" if repeated else None
        made.append(Task(**task.model_dump(), allow_code=allow_code, label=label, folder=folder))
    return tuple(made)


def worker_tasks(evaluate: schema.Evaluate) -> tuple[Task, ...]:
    """The benchmarks to run in Ray's workers: with absolute paths, because workers have working directories of their own."""
    tasks = lm_eval_tasks(evaluate.tasks, evaluate.allow_code, evaluate.task_folder)
    return tuple(replace(task, data=absolute(task.data), folder=absolute(task.folder)) for task in tasks)


def training_tasks(evaluate: schema.Evaluate) -> tuple[Task, ...]:
    """The benchmarks to run during a training: `worker_tasks` on at most `evaluate.training_limit` documents each."""
    most = evaluate.training_limit
    if most is None:
        return worker_tasks(evaluate)
    return tuple(
        replace(task, limit=most if task.limit is None or task.limit < 1 else min(most, task.limit))
        for task in worker_tasks(evaluate)
    )


def layer_scoring(calibrate: schema.Calibrate, num_layers: int, depths: Collection[int]) -> LayerScoring:
    """How to score the layers of a model that has `num_layers` layers and may be pruned to any of `depths`."""
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
    """Name of the metric that layers are ranked by, as in `ImportanceScores`."""
    return f"task:{calibrate.task.name}" if calibrate.task else calibrate.layers


def pruning_source(
    calibrate: schema.Calibrate,
    *,
    folder: str,
    scores: str,
    dtype: str,
    rows: str,
    separate_documents: bool = False,
) -> PruningSource:
    """The checkpoint to prune, and how.

    folder: of the checkpoint. scores: file with its importance scores. dtype: name of the compute dtype. rows: folder of
    packed rows that it is scored on again if it is pruned in several steps.
    """
    return PruningSource(
        folder=folder,
        scores=scores,
        dtype=dtype,
        depth=calibrate.depth,
        metric=layer_metric(calibrate),
        merge_heads=calibrate.merge_heads,
        recalibration=recalibration(calibrate, rows, separate_documents) if calibrate.steps > 1 else None,
    )


def recalibration(calibrate: schema.Calibrate, rows: str, separate_documents: bool = False) -> Recalibration:
    """How to score a model again between pruning steps; `rows` is the folder of packed rows."""
    return Recalibration(
        steps=calibrate.steps,
        rows=rows,
        num_rows=calibrate.rows,
        layer_metric=calibrate.layers if calibrate.layers in ("loss", "logit_error") else "cosine",
        layer_rows=calibrate.layer_rows,
        batch_aggregation=calibrate.batch_aggregation,
        sequence_aggregation=calibrate.sequence_aggregation,
        neurons=calibrate.neurons,
        separate_documents=separate_documents,
    )


def distill_config(training: schema.Training) -> DistillConfig:
    """The hyperparameters of a training; those that are `auto` have the defaults of `DistillConfig`, which CPUs use."""
    # the training loop does not run benchmarks itself
    return DistillConfig(**training.model_dump(exclude={"evaluate_tasks_every", *auto_settings(training)}))


def auto_settings(training: schema.Training) -> tuple[str, ...]:
    """Keys of a training that are `auto`."""
    return tuple(name for name in CHOSEN if getattr(training, name) == "auto")


def training_values(training: schema.Training) -> dict[str, Any]:
    """A training's values for fingerprints: with the values for CPUs instead of `auto`, and without `deterministic`,
    `cuda_graphs` and `fp8: none`, which earlier versions did not have, and optimizers that compute the same. What is left out
    changes the result only by rounding."""
    config = distill_config(training)
    values = training.model_dump(exclude={"deterministic", "cuda_graphs"})
    if training.fp8 == "none":
        del values["fp8"]
    if training.optimizer != ADAMW_8BIT:
        del values["optimizer"]
    return values | {name: getattr(config, name) for name in auto_settings(training) if name in values}


def training_identity(training: schema.Training) -> dict[str, Any]:
    """The values of a training that change its result; checkpoints do not."""
    values = training_values(training)
    del values["checkpoint_every"]
    return values


def logit_losses(recipe: schema.Recipe) -> Losses:
    """The losses on logits alone, which candidates are trained with; they need only stored hidden states of the teacher.

    Raises InputError for values that contradict each other.
    """
    with named_by_key("losses"):
        return Losses(**recipe.losses.model_dump(exclude=INTERMEDIATE) | {"top_k": _top_k(recipe)})


def distillation_losses(recipe: schema.Recipe, student: Architecture, teacher: Architecture) -> tuple[Losses, str]:
    """All losses for the full distillation of `student`, and a sentence on why these.

    Raises InputError for values that contradict each other, and for layers that the student or the teacher does not have.
    """
    settings, reason = recipe.losses.model_dump(), "as the recipe says"
    if recipe.losses.hidden == "auto":
        default, reason = default_losses(student, teacher)
        settings |= {"hidden": default.hidden, "embedding": recipe.losses.embedding or default.embedding}
    with named_by_key("losses"):
        losses = Losses(**settings | {"top_k": _top_k(recipe)})
        for layers in (*losses.hidden, *losses.attention, *losses.mlp_input):
            mapped_layers(layers, teacher.num_layers, student.num_layers)
    return losses, reason


def _top_k(recipe: schema.Recipe) -> int:
    """Number of top-k tokens that the losses use: `losses.top_k`, or as many as are stored. 0: the whole vocabulary."""
    return recipe.losses.top_k or recipe.targets.top_k


def limits(recipe: schema.Recipe, member: schema.Member) -> Limits | None:
    """Upper limits for a candidate for `member`; None without limits."""
    if member.limits is None:
        return None
    return Limits(**member.limits.model_dump() | {"context": member.limits.context or recipe.data.seq_length})


def halving(search: schema.Search) -> Halving | None:
    """The rule that stops candidates at rungs; None if all are distilled to the end."""
    return Halving(**search.halving.model_dump()) if search.halving else None


def examples_input(tasks: Sequence[schema.Task]) -> dict[str, int]:
    """How few-shot examples are drawn from local documents, among the inputs of a stage that does so."""
    if not any(task.data and task.num_fewshot for task in tasks):
        return {}
    from minitron.evaluation.tasks import EXAMPLES

    return {"examples": EXAMPLES}


def benchmarks(
    recipe: schema.Recipe, tokenizer: str, chat_template: str = "", generation: str = ""
) -> Benchmarks | None:
    """The benchmarks to run on the best candidates; None without. `tokenizer` is the checkpoint folder of the tokenizer, the
    other two are fields of `Benchmarks`."""
    from minitron_search.benchmarks import Benchmarks

    evaluate = recipe.search.evaluate
    if evaluate is None:
        return None
    return Benchmarks(
        tasks=lm_eval_tasks(evaluate.tasks, recipe.evaluate.allow_code, recipe.evaluate.task_folder),
        keep=evaluate.keep,
        tokenizer=tokenizer,
        batch_rows=recipe.evaluate.batch_rows,
        add_bos=recipe.data.bos,
        chat_template=chat_template,
        generation=generation,
    )
