"""Calibrate: importance scores for every axis from one forward-only pass."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from minitron import storage
from minitron.data import Rows
from minitron.device import DTYPES, device
from minitron.importance import estimate_importance
from minitron.models import load_model
from minitron_platform.context import Context

VERSION = 1


def inputs(context: Context) -> dict[str, Any]:
    return {
        "teacher": context.done["teacher"]["id"],
        "dtype": context.done["teacher"]["dtype"],
        "rows": context.done["data"]["train"],
        "calibrate": context.recipe.calibrate.model_dump(),
        "blocks": _block_sizes(context),
    }


def _block_sizes(context: Context) -> list[int]:
    """How many layers the space may remove; each is measured as a contiguous block."""
    if context.recipe.calibrate.layers == "cosine":
        return []
    total = context.done["teacher"]["architecture"]["num_layers"]
    depths = context.recipe.search.space.get("num_layers", [])
    return sorted({total - int(depth) for depth in depths} - {0})


def run(context: Context, folder: str) -> dict[str, Any]:
    settings, teacher = context.recipe.calibrate, context.done["teacher"]
    target = storage.join(folder, "scores.safetensors")
    context.console.status("loading the teacher")
    model = load_model(storage.fetch(teacher["folder"]), DTYPES[teacher["dtype"]]).to(device())
    rows = Rows.open(context.done["data"]["folder"], "train")
    scores = estimate_importance(
        model,
        rows.take(range(min(settings.rows, len(rows)))),
        batch_aggregation=settings.batch_aggregation,
        sequence_aggregation=settings.sequence_aggregation,
        block_sizes=_block_sizes(context),
        block_rows=settings.layer_rows,
        progress=context.console.counter("row passes"),
    )
    scores.provenance.update(teacher=teacher["id"], rows=rows.fingerprint)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "scores.safetensors"
        scores.save(file)
        storage.write_bytes(target, file.read_bytes())
    starts = {size: int(scores.blocks(size).argmin()) for size in _block_sizes(context)}
    blocks = ", ".join(f"{start}-{start + size - 1}" for size, start in starts.items())
    return {
        "scores": target,
        "id": storage.fingerprint(storage.sha256(storage.fetch_file(target))),
        "blocks": {str(size): start for size, start in starts.items()},
        "summary": f"{settings.rows} rows" + (f" · least important blocks of layers: {blocks}" if blocks else ""),
    }
