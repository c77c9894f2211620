"""Data: text, tokenised and packed once into rows."""

from __future__ import annotations

from typing import Any

from minitron import storage
from minitron.data import Rows, TextSource, pack, source_identity
from minitron.models import load_tokenizer
from minitron_platform.context import Context
from minitron_platform.recipe import Data

VERSION = 1


def source(data: Data) -> TextSource:
    """The text a recipe names."""
    return TextSource(
        kind=data.kind, path=data.path, key=data.key, name=data.name, split=data.split, revision=data.revision
    )


def inputs(context: Context) -> dict[str, Any]:
    data = context.recipe.data
    return {
        "teacher": context.done["teacher"]["id"],
        "source": source_identity(source(data)),
        "data": data.model_dump(),
    }


def run(context: Context, folder: str) -> dict[str, Any]:
    data = context.recipe.data
    target = storage.join(folder, "rows")
    context.console.status("reading text")
    tokenizer = load_tokenizer(storage.fetch(context.done["teacher"]["folder"]))
    rows = pack(
        source(data),
        tokenizer,
        target,
        seq_length=data.seq_length,
        train_rows=data.train_rows,
        heldout_rows=data.heldout_rows,
        heldout_fraction=data.heldout_fraction,
        progress=context.console.counter("tokens"),
    )
    heldout = Rows.open(target, "heldout")
    return {
        "folder": target,
        "train": rows.fingerprint,
        "heldout": heldout.fingerprint,
        "seq_length": rows.seq_length,
        "train_tokens": len(rows) * rows.seq_length,
        "heldout_tokens": len(heldout) * rows.seq_length,
        "summary": f"{len(rows):,} training and {len(heldout):,} held-out rows of {rows.seq_length} tokens",
    }
