"""Targets: the teacher's hidden states of every row, computed once and read by everything that distils."""

from __future__ import annotations

from typing import Any

from torch import nn

from minitron import storage
from minitron.data import Split
from minitron.device import DTYPES
from minitron.distill import store_hidden
from minitron.distill.materials import Materials
from minitron.distill.store import stored_bytes
from minitron.origin import Origin, Recalibration
from minitron_platform.context import Context
from minitron_platform.stages.calibrate import metric

VERSION = 2


def inputs(context: Context) -> dict[str, Any]:
    return {
        "teacher": context.done["correct"]["id"],
        "dtype": context.done["teacher"]["dtype"],
        "train": context.done["data"]["train"],
        "heldout": context.done["data"]["heldout"],
    }


def run(context: Context, folder: str) -> dict[str, Any]:
    outputs = {"train": storage.join(folder, "train"), "heldout": storage.join(folder, "heldout")}
    reads = materials(context, outputs)
    num_rows = sum(len(reads.open_rows(split)) for split in ("train", "heldout"))
    seq_length = reads.open_rows("train").seq_length
    architecture, dtype = context.done["teacher"]["architecture"], DTYPES[context.done["teacher"]["dtype"]]
    size = stored_bytes(num_rows, seq_length, architecture["hidden_size"], dtype.itemsize)
    teacher: list[nn.Module] = []

    def load_once() -> nn.Module:
        if not teacher:
            context.console.say(f"  the teacher's hidden states of {num_rows:,} rows: {size / 1e6:,.0f} MB")
            context.console.status("loading the teacher")
            teacher.append(reads.load_teacher())
        return teacher[0]

    computed = 0
    splits: tuple[Split, ...] = ("heldout", "train")
    for split in splits:
        computed += store_hidden(
            load_once,
            reads.open_rows(split),
            outputs[split],
            key=reads.targets_key(split),
            progress=context.console.counter(f"{split} rows"),
        )
    return {
        **outputs,
        "rows_computed": computed,
        "summary": f"teacher run on {computed:,} of {num_rows:,} rows · {size / 1e6:,.0f} MB",
    }


def materials(context: Context, targets: dict[str, Any] | None = None) -> Materials:
    """What distillations of this run read."""
    done = context.done
    stored = targets or done["targets"]
    return Materials(
        teacher=done["correct"]["folder"],
        teacher_id=done["correct"]["id"],
        dtype=done["teacher"]["dtype"],
        rows=done["data"]["folder"],
        train_targets=stored["train"],
        heldout_targets=stored["heldout"],
    )


def origin(context: Context) -> Origin:
    """What the family's current model is cut from."""
    done, settings = context.done, context.recipe.calibrate
    return Origin(
        folder=context.base["folder"],
        scores=done["calibrate"]["scores"],
        dtype=done["teacher"]["dtype"],
        depth=settings.depth,
        metric=metric(settings),
        merge_heads=settings.merge_heads,
        again=_recalibration(context) if settings.steps > 1 else None,
    )


def _recalibration(context: Context) -> Recalibration:
    settings = context.recipe.calibrate
    return Recalibration(
        steps=settings.steps,
        rows=context.done["data"]["folder"],
        num_rows=settings.rows,
        layer_metric=settings.layers if settings.layers in ("loss", "logit_error") else "cosine",
        layer_rows=settings.layer_rows,
        batch_aggregation=settings.batch_aggregation,
        sequence_aggregation=settings.sequence_aggregation,
        neurons=settings.neurons,
    )
