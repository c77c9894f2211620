"""Calibrate: importance scores for every axis of what the next model is cut from, without any gradient.

A corrected teacher is scored as it was before: correction doesn't change which weights to prune (arXiv 2408.11796).
"""

from __future__ import annotations

import hashlib
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from minitron import storage
from minitron.data import Rows, rows_for_step
from minitron.device import DTYPES, device
from minitron.evaluation.documents import documents_identity
from minitron.importance import ImportanceScores, estimate_importance
from minitron.models import load_model, load_tokenizer
from minitron.pruning.selection import kept_layers
from minitron_platform.estimates.memory import calibration_memory
from minitron_platform.estimates.outlook import Estimate, Outlook
from minitron_platform.recipes import schema
from minitron_platform.recipes.build import layer_metric, layer_scoring
from minitron_platform.stages.base import pruning_base
from minitron_platform.stages.context import Context
from minitron_platform.stages.data import Data
from minitron_platform.stages.stage import ArtifactPath, Stage, StageOutput
from minitron_platform.stages.state import RunState
from minitron_platform.stages.teacher import Teacher


class CalibrateOutput(StageOutput):
    scores: ArtifactPath
    """Importance scores, as `minitron.ImportanceScores` saves them."""
    id: str
    """Of all that decides what a candidate keeps, whichever other depths were measured beside its own."""
    removed: dict[str, list[int]]
    """Layers that go, by the number that is left."""


class Calibrate(Stage[CalibrateOutput]):
    name = "calibrate"
    version = 3
    per_model = True
    output_type = CalibrateOutput

    def inputs(self, state: RunState) -> dict[str, Any]:
        return {
            "model": _scored_model(state)[1],
            "dtype": state.output(Teacher).dtype,
            "rows": state.output(Data).train,
            "calibrate": state.recipe.calibrate.model_dump(exclude={"steps", "merge_heads"}),
            "depths": _depths(state),
            "task": _task_identity(state.recipe.calibrate),
        }

    def estimate(self, outlook: Outlook, member: schema.Member | None) -> Estimate:
        assert member is not None
        settings, seq = outlook.recipe.calibrate, outlook.recipe.data.seq_length
        base = outlook.base(member)
        depths = {shape.num_layers for shape in outlook.shapes(member)}
        scoring = layer_scoring(settings, base.num_layers, depths)
        passes = 0.0
        if scoring.metric in ("loss", "logit_error"):  # a task's documents are not known here
            # on average half of the layers are behind a removed block
            passes = scoring.passes(base.num_layers, scoring.rows or 0) / 2
        return Estimate(
            f"{settings.rows} rows, layers by {settings.layers}, {settings.depth}",
            flops=base.flops_per_token(seq) * seq * (settings.rows + passes),
            bytes=4 * base.num_layers * base.intermediate_size,
            memory=calibration_memory(outlook.recipe, outlook.teacher, outlook.value_bytes),
        )

    def run(self, context: Context, folder: str) -> CalibrateOutput:
        settings = context.recipe.calibrate
        folder_of_model, model_id = _scored_model(context)
        teacher = context.output(Teacher)
        target = storage.join(folder, "scores.safetensors")
        context.console.status("loading the model")
        model = load_model(storage.fetch(folder_of_model), DTYPES[teacher.dtype]).to(device())
        rows = Rows.open(context.output(Data).folder, "train")
        total = pruning_base(context).architecture.num_layers
        scores = estimate_importance(
            model,
            calibration_rows(settings, rows),
            batch_aggregation=settings.batch_aggregation,
            sequence_aggregation=settings.sequence_aggregation,
            neurons=settings.neurons,
            layers=layer_scoring(settings, total, _depths(context)),
            tokenizer=load_tokenizer(storage.fetch(teacher.folder)) if settings.task else None,
            add_bos=context.recipe.data.bos,
            progress=context.console.counter("row passes"),
        )
        scores.provenance.update(model=model_id, rows_id=rows.fingerprint)
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "scores.safetensors"
            scores.save(file)
            storage.write_bytes(target, file.read_bytes())
        removed = {
            depth: sorted(
                set(range(total))
                - set(kept_layers(scores, total, depth, how=settings.depth, metric=layer_metric(settings)))
            )
            for depth in _depths(context)
        }
        chosen = "; ".join(f"{depth} left: {_spans(layers)}" for depth, layers in removed.items())
        return CalibrateOutput(
            scores=target,
            id=_identity(scores, settings),
            removed={str(depth): layers for depth, layers in removed.items()},
            summary=f"{settings.rows} rows"
            + (f" · layers that matter least, by {settings.layers}: {chosen}" if chosen else ""),
        )


def _scored_model(state: RunState) -> tuple[str, str]:
    """Folder and identity of the model that is scored."""
    if state.recipe.origin(state.member):
        base = pruning_base(state)
        return base.folder, base.id
    teacher = state.output(Teacher)
    return teacher.folder, teacher.id


def _task_identity(settings: schema.Calibrate) -> Any:
    """What the figures of `layers: task` depend on beside the recipe."""
    if settings.task is None:
        return None
    return [version("lm_eval"), documents_identity(settings.task.data) if settings.task.data else None]


def _depths(state: RunState) -> list[int]:
    """Numbers of layers that the current model may keep, fewer than there are."""
    total = pruning_base(state).architecture.num_layers
    named = [*state.member.space.get("num_layers", [])]
    named += [point["num_layers"] for point in state.member.points if "num_layers" in point]
    return sorted({int(depth) for depth in named if depth < total})


def calibration_rows(settings: schema.Calibrate, rows: Rows) -> Tensor:
    """Training rows drawn at random, always the same."""
    return rows.take(rows_for_step(len(rows), min(settings.rows, len(rows)), 0, seed=0))


def _identity(scores: ImportanceScores, settings: schema.Calibrate) -> str:
    """A name of all that decides what a candidate keeps, whichever other depths were measured beside its own."""
    widths = [scores.heads, scores.neurons, scores.channels, *([] if scores.experts is None else [scores.experts])]
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in widths)).hexdigest()
    return storage.fingerprint({"widths": digest, "calibrate": settings.model_dump(), "task": _task_identity(settings)})


def _spans(layers: list[int]) -> str:
    """[3, 4, 5, 9] as 3-5, 9."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
