"""Inputs for a small search, and a look at the files that it wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from helpers import tiny

from minitron import Architecture, estimate_importance
from minitron.data import Rows, TextSource, pack
from minitron.distill import DistillConfig, Losses, store_hidden
from minitron.distill.inputs import DistillInputs
from minitron.models import load_model, load_tokenizer
from minitron.pruning.source import PruningSource
from minitron_search import candidates
from minitron_search.search_task import SearchTask

CONFIG = DistillConfig(steps=8, batch_rows=4, micro_batch_rows=4, peak_lr=1e-3, min_lr=1e-4, warmup_steps=2)
RUNGS = (4, 6)


def make_inputs(folder):
    """Distillation inputs with a trained teacher, the source that students are pruned from, and six candidates."""
    teacher = tiny.checkpoint(folder / "teacher")
    source = TextSource("jsonl", path=str(tiny.corpus(folder / "text.jsonl")))
    rows = pack(source, load_tokenizer(teacher), str(folder / "rows"), seq_length=32, train_rows=64, heldout_rows=12)
    materials = DistillInputs(
        teacher=str(teacher),
        teacher_id="t",
        dtype="float32",
        rows=str(folder / "rows"),
        train_targets=str(folder / "train"),
        heldout_targets=str(folder / "heldout"),
    )
    model = load_model(teacher)
    for split in ("train", "heldout"):
        store_hidden(
            lambda: model,
            Rows.open(materials.rows, split),
            str(folder / split),
            key=materials.targets_key(split),
        )
    estimate_importance(model, rows.take(range(8))).save(folder / "scores.safetensors")
    origin = PruningSource(folder=str(teacher), scores=str(folder / "scores.safetensors"), dtype="float32")
    base = Architecture.from_config(model.config)
    found = candidates(base, {"hidden_size": [24, 36], "intermediate_size": [24, 48, 96]}, 0, base.num_parameters)
    return materials, origin, found


def search_task(made, folder, **changes):
    materials, origin, _ = made
    task = SearchTask(
        materials=materials, origin=origin, config=CONFIG, losses=Losses(), folder=str(folder), rungs=RUNGS
    )
    return replace(task, **changes)


def json_files(folder):
    """Modification times, in nanoseconds, of the JSON files below `folder`."""
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*.json")}
