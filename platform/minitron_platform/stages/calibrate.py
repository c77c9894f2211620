"""Calibrate: importance scores for every axis of what the next model is cut from, from one forward-only pass.

A corrected teacher is scored as it was before: correction doesn't change which weights to prune (arXiv 2408.11796).
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron import storage
from minitron.architecture import Architecture
from minitron.data import Rows
from minitron.device import DTYPES, device
from minitron.evaluation import Task
from minitron.importance import LayerScoring, estimate_importance
from minitron.models import load_model
from minitron.selection import kept_layers
from minitron_platform.context import Context

VERSION = 2


def inputs(context: Context) -> dict[str, Any]:
    return {
        "model": _model(context)["id"],
        "dtype": context.done["teacher"]["dtype"],
        "rows": context.done["data"]["train"],
        "calibrate": context.recipe.calibrate.model_dump(exclude={"depth"}),
        "depths": _depths(context),
        "iterative": context.recipe.calibrate.depth == "iterative",
    }


def _model(context: Context) -> dict[str, Any]:
    return context.base if context.recipe.origin(context.member) else context.done["teacher"]


def _depths(context: Context) -> list[int]:
    """Numbers of layers that the models cut from this one may keep, fewer than it has."""
    total = context.base["architecture"]["num_layers"]
    origin = context.recipe.origin(context.member)
    siblings = [m for m in context.recipe.family if context.recipe.origin(m) == origin]
    named = [d for m in siblings for d in m.space.get("num_layers", [])]
    named += [point["num_layers"] for m in siblings for point in m.points if "num_layers" in point]
    return sorted({int(d) for d in named if d < total})


def _scoring(context: Context) -> LayerScoring:
    settings, total = context.recipe.calibrate, context.base["architecture"]["num_layers"]
    depths = _depths(context)
    asked = LayerScoring(
        metric=settings.layers,
        rows=settings.layer_rows,
        task=Task(**settings.task.model_dump()) if settings.task else None,
    )
    if not depths:
        return LayerScoring()
    if settings.depth == "iterative":
        return replace(asked, iterative=1, keep=depths[0])
    sizes = (1,) if settings.depth == "scattered" else tuple(total - depth for depth in reversed(depths))
    return replace(asked, sizes=sizes)


def run(context: Context, folder: str) -> dict[str, Any]:
    settings, scored = context.recipe.calibrate, _model(context)
    target = storage.join(folder, "scores.safetensors")
    context.console.status("loading the model")
    model = load_model(storage.fetch(scored["folder"]), DTYPES[context.done["teacher"]["dtype"]]).to(device())
    rows = Rows.open(context.done["data"]["folder"], "train")
    scores = estimate_importance(
        model,
        rows.take(range(min(settings.rows, len(rows)))),
        batch_aggregation=settings.batch_aggregation,
        sequence_aggregation=settings.sequence_aggregation,
        neurons=settings.neurons,
        layers=_scoring(context),
        progress=context.console.counter("row passes"),
    )
    scores.provenance.update(model=scored["id"], rows_id=rows.fingerprint)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "scores.safetensors"
        scores.save(file)
        storage.write_bytes(target, file.read_bytes())
    total = Architecture.from_config(model.config).num_layers
    removed = {
        depth: sorted(
            set(range(total)) - set(kept_layers(scores, total, depth, how=settings.depth, metric=metric(context)))
        )
        for depth in _depths(context)
    }
    chosen = "; ".join(f"{depth} left: {_spans(layers)}" for depth, layers in removed.items())
    return {
        "scores": target,
        "id": storage.fingerprint(storage.sha256(storage.fetch_file(target))),
        "removed": {str(depth): layers for depth, layers in removed.items()},
        "summary": f"{settings.rows} rows"
        + (f" · layers that matter least, by {settings.layers}: {chosen}" if chosen else ""),
    }


def metric(context: Context) -> str | None:
    """What layers are ranked by; None for the loss."""
    settings = context.recipe.calibrate
    if settings.layers == "task" and settings.task:
        return f"task:{settings.task.name}"
    return None if settings.layers == "loss" else settings.layers


def _spans(layers: list[int]) -> str:
    """[3, 4, 5, 9] as 3-5, 9."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
