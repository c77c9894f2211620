"""Calibrate: importance scores for every axis of the model to prune, from forward passes alone.

The teacher is scored before its correction, which does not change what should be pruned (arXiv 2408.11796).
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from minitron import storage
from minitron.data import Rows, rows_for_step
from minitron.evaluation.documents import documents_identity
from minitron.importance import ImportanceScores, LayerScoring, estimate_importance
from minitron.models import load_tokenizer
from minitron.processes import largest
from minitron.pruning.selection import kept_layers
from minitron_platform.estimates.memory import calibration_memory
from minitron_platform.estimates.node_memory import forward_work
from minitron_platform.estimates.outlook import Estimate, Outlook
from minitron_platform.estimates.phases import calibration_parts
from minitron_platform.recipes import schema
from minitron_platform.recipes.build import examples_input, layer_metric, layer_scoring
from minitron_platform.stages.base import pruning_base
from minitron_platform.stages.context import Context
from minitron_platform.stages.data import Data
from minitron_platform.stages.stage import ArtifactPath, Stage, StageOutput
from minitron_platform.stages.state import RunState
from minitron_platform.stages.teacher import Teacher, chat_template_input
from minitron_platform.workers import models
from minitron_platform.workers.worker import Worker


class CalibrateOutput(StageOutput):
    scores: ArtifactPath
    """File of importance scores, as `minitron.ImportanceScores` saves them."""
    id: str
    """Content address of the scores and settings that decide what a candidate keeps; it does not depend on which depths other
    candidates have."""
    removed: dict[str, list[int]]
    """Layers that are removed, by the number of layers that are left."""


class Calibrate(Stage[CalibrateOutput]):
    name = "calibrate"
    version = 3
    per_model = True
    output_type = CalibrateOutput

    def inputs(self, state: RunState) -> dict[str, Any]:
        return {
            "model": _model_to_score(state)[1],
            "dtype": state.output(Teacher).dtype,
            "rows": state.output(Data).train,
            **state.attention(),
            "calibrate": state.recipe.calibrate.model_dump(exclude={"steps", "merge_heads"}),
            "depths": _depths(state),
            "task": _task_identity(state.recipe.calibrate),
            **chat_template_input(state, bool((task := state.recipe.calibrate.task) and task.chat_template)),
        }

    def estimate(self, outlook: Outlook, member: schema.Member | None) -> Estimate:
        assert member is not None
        settings = outlook.recipe.calibrate
        base = outlook.base(member)
        depths = {shape.num_layers for shape in outlook.shapes(member)}
        scoring = layer_scoring(settings, base.num_layers, depths)
        passes = 0.0
        if scoring.metric in ("loss", "logit_error"):  # the length of a task's documents is not known here
            # only the layers behind a removed block are run again, half of them on average
            passes = scoring.passes(base.num_layers, scoring.rows or 0) / 2
        return Estimate(
            f"{settings.rows} rows, layers by {settings.layers}, {settings.depth}",
            bytes=4 * base.num_layers * base.intermediate_size,
            memory=calibration_memory(outlook.recipe, outlook.teacher, outlook.value_bytes),
            node=forward_work([base], outlook.value_bytes, outlook.resources),
            parts=calibration_parts(outlook, base, passes),
        )

    def run(self, context: Context, folder: str) -> CalibrateOutput:
        settings = context.recipe.calibrate
        model_folder, model_id = _model_to_score(context)
        teacher = context.output(Teacher)
        target = storage.join(folder, "scores.safetensors")
        num_layers = pruning_base(context).architecture.num_layers
        depths = _depths(context)
        scoring = _Scoring(
            model=model_folder,
            model_id=model_id,
            tokenizer=teacher.folder,
            dtype=teacher.dtype,
            rows=context.output(Data).folder,
            separate_documents=context.separate_documents,
            add_bos=context.recipe.data.bos,
            settings=settings,
            layers=layer_scoring(settings, num_layers, depths),
            target=target,
        )
        if not storage.exists(target):
            context.workers.compute(_score, scoring)
        scores = ImportanceScores.load(storage.fetch_file(target))
        removed: dict[str, list[int]] = {}
        for depth in depths:
            kept = kept_layers(scores, num_layers, depth, how=settings.depth, metric=layer_metric(settings))
            removed[str(depth)] = sorted(set(range(num_layers)) - set(kept))
        least_important = "; ".join(f"for {depth} layers remove {_spans(layers)}" for depth, layers in removed.items())
        return CalibrateOutput(
            scores=target,
            id=_identity(scores, settings),
            removed=removed,
            summary=f"{settings.rows} rows"
            + (f" · least important layers by {settings.layers}: {least_important}" if least_important else ""),
        )


@dataclass(frozen=True)
class _Scoring:
    """What is scored, on what and how."""

    model: str
    """Checkpoint folder."""
    model_id: str
    tokenizer: str
    """Checkpoint folder of its tokenizer."""
    dtype: str
    rows: str
    """Folder of the packed rows."""
    separate_documents: bool
    add_bos: bool | None
    settings: schema.Calibrate
    layers: LayerScoring
    target: str
    """File that the scores are written to."""


def _score(task: _Scoring, worker: Worker) -> None:
    """Score the model, each process on its share of the rows, and write the scores, unless a worker has that died later."""
    if largest([storage.exists(task.target)], worker.count > 1) == [1]:
        return
    settings = task.settings
    worker.progress.status("loading the model")
    model = models.load(worker, task.model, task.dtype)
    rows = Rows.open(task.rows, "train")
    scores = estimate_importance(
        model,
        calibration_rows(settings, rows),
        batch_aggregation=settings.batch_aggregation,
        sequence_aggregation=settings.sequence_aggregation,
        neurons=settings.neurons,
        layers=task.layers,
        tokenizer=load_tokenizer(storage.fetch(task.tokenizer, weights=False)) if settings.task else None,
        add_bos=task.add_bos,
        documents=rows.boundaries if task.separate_documents else None,
        progress=worker.progress.counter("row passes"),
    )
    if worker.is_first:
        scores.provenance.update(model=task.model_id, rows_id=rows.fingerprint)
        with tempfile.TemporaryDirectory() as temporary_folder:
            file = Path(temporary_folder) / "scores.safetensors"
            scores.save(file)
            worker.before_commit()
            storage.write_bytes(task.target, file.read_bytes())


def _model_to_score(state: RunState) -> tuple[str, str]:
    """Checkpoint folder and content address of the model that is scored."""
    if state.recipe.origin(state.member):
        base = pruning_base(state)
        return base.folder, base.id
    teacher = state.output(Teacher)
    return teacher.folder, teacher.id


def _task_identity(settings: schema.Calibrate) -> Any:
    """What the scores of `layers: task` depend on in addition to the recipe: lm-eval's version and the documents."""
    if settings.task is None:
        return None
    documents = documents_identity(settings.task.data) if settings.task.data else None
    return [version("lm_eval"), documents, *examples_input([settings.task]).values()]


def _depths(state: RunState) -> list[int]:
    """Numbers of layers that candidates for the current model may have, less than those of the model they are pruned from."""
    num_layers = pruning_base(state).architecture.num_layers
    depths = [*state.member.space.get("num_layers", [])]
    depths += [point["num_layers"] for point in state.member.points if "num_layers" in point]
    return sorted({int(depth) for depth in depths if depth < num_layers})


def calibration_rows(settings: schema.Calibrate, rows: Rows) -> Tensor:
    """The rows to calibrate on, int64 [rows, seq_length]: training rows drawn at random with a fixed seed."""
    return rows.take(rows_for_step(len(rows), min(settings.rows, len(rows)), 0, seed=0))


def _identity(scores: ImportanceScores, settings: schema.Calibrate) -> str:
    """Content address of everything that decides what a candidate keeps. The layers' scores are not part of it: they follow
    from the model and the settings, and which depths were measured depends on the other candidates."""
    widths = [scores.heads, scores.neurons, scores.channels, *([] if scores.experts is None else [scores.experts])]
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in widths)).hexdigest()
    return storage.fingerprint({"widths": digest, "calibrate": settings.model_dump(), "task": _task_identity(settings)})


def _spans(layers: list[int]) -> str:
    """Layers as text: [3, 4, 5, 9] as "3-5, 9"."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
