"""From chunks of tokenised text to rows, in one process, without anything else being stored."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from minitron.data.placing import Layout, Placer
from minitron.data.row_writer import RowWriter
from minitron.data.rows import INDEX, Split, content_hash
from minitron.data.spans import located
from minitron.data.tokenising import Chunk
from minitron.storage import disk_errors, is_local, publish, staging_folder, upload, write_json

Chunks = Iterator[Chunk]


def write_rows(
    layout: Layout,
    target: str,
    streams: Callable[[Callable[[Split], bool]], tuple[Sequence[Chunks], Chunks | None]],
    progress: Callable[[int, int], None] | None = None,
    before_commit: Callable[[], None] = lambda: None,
) -> None:
    """Write the rows of `layout` and their index into the folder `target`, which is complete or does not exist.

    streams: gives the chunks of each source, and those of the held-out text if that has a source of its own; its argument tells
    whether a split needs no more text. before_commit: called before the folder is published. Shards are copied to a remote
    target as soon as they are complete.

    Raises InputError if a source ends too early, and what a stream raises before the rows are complete.
    """
    entries: dict[str, Any] = {}
    with disk_errors(target):
        folder = staging_folder(target)

        def written(shard: Path) -> None:
            entries.update(upload(folder, target, shard.name))
            if not is_local(target):
                shard.unlink()

        try:
            writer = RowWriter(layout, folder, written)
            placer = Placer(layout, writer, progress)
            numbers = count()

            def pieces(chunks: Chunks) -> Iterator[np.ndarray]:
                for chunk in chunks:
                    number = next(numbers)
                    writer.blocks[number] = chunk.tokens
                    yield located(chunk.pieces, number)

            sources, heldout = streams(placer.full)
            placer.place([pieces(one) for one in sources], None if heldout is None else pieces(heldout))
            writer.close()
            write_json(str(folder / INDEX), complete_index(placer.index(), entries))
            before_commit()
            publish(folder, target, entries | upload(folder, target, INDEX), {"kind": "rows"})
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def complete_index(index: dict[str, Any], entries: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The index with the hash of each split. entries: of all shards in the manifest."""
    splits = {
        split: {**values, "sha256": content_hash(split, values["rows"], index["shard_rows"], entries)}
        for split, values in index["splits"].items()
    }
    return {**index, "splits": splits}
