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
from minitron_platform.recipes.build import layer_metric, layer_scoring
from minitron_platform.recipes.schema import Calibrate
from minitron_platform.stages.context import Context

VERSION = 3


def inputs(context: Context) -> dict[str, Any]:
    return {
        "model": _model(context)["id"],
        "dtype": context.done["teacher"]["dtype"],
        "rows": context.done["data"]["train"],
        "calibrate": context.recipe.calibrate.model_dump(exclude={"steps", "merge_heads"}),
        "depths": _depths(context),
        "task": _task_identity(context.recipe.calibrate),
    }


def _model(context: Context) -> dict[str, Any]:
    return context.base if context.recipe.origin(context.member) else context.done["teacher"]


def _task_identity(settings: Calibrate) -> Any:
    """What the figures of `layers: task` depend on beside the recipe."""
    if settings.task is None:
        return None
    return [version("lm_eval"), documents_identity(settings.task.data) if settings.task.data else None]


def _depths(context: Context) -> list[int]:
    """Numbers of layers that the current model may keep, fewer than there are."""
    total = context.base["architecture"]["num_layers"]
    named = [*context.member.space.get("num_layers", [])]
    named += [point["num_layers"] for point in context.member.points if "num_layers" in point]
    return sorted({int(depth) for depth in named if depth < total})


def calibration_rows(settings: Calibrate, rows: Rows) -> Tensor:
    """Training rows drawn at random, always the same."""
    return rows.take(rows_for_step(len(rows), min(settings.rows, len(rows)), 0, seed=0))


def run(context: Context, folder: str) -> dict[str, Any]:
    settings, scored = context.recipe.calibrate, _model(context)
    target = storage.join(folder, "scores.safetensors")
    context.console.status("loading the model")
    model = load_model(storage.fetch(scored["folder"]), DTYPES[context.done["teacher"]["dtype"]]).to(device())
    rows = Rows.open(context.done["data"]["folder"], "train")
    total = context.base["architecture"]["num_layers"]
    scores = estimate_importance(
        model,
        calibration_rows(settings, rows),
        batch_aggregation=settings.batch_aggregation,
        sequence_aggregation=settings.sequence_aggregation,
        neurons=settings.neurons,
        layers=layer_scoring(settings, total, _depths(context)),
        tokenizer=load_tokenizer(storage.fetch(context.done["teacher"]["folder"])) if settings.task else None,
        add_bos=context.recipe.data.bos,
        progress=context.console.counter("row passes"),
    )
    scores.provenance.update(model=scored["id"], rows_id=rows.fingerprint)
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
    return {
        "scores": target,
        "id": _identity(scores, settings),
        "removed": {str(depth): layers for depth, layers in removed.items()},
        "summary": f"{settings.rows} rows"
        + (f" · layers that matter least, by {settings.layers}: {chosen}" if chosen else ""),
    }


def _identity(scores: ImportanceScores, settings: Calibrate) -> str:
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
