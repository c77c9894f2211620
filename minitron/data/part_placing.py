"""Placing the documents of finished parts: the plans of all shards, kept until the rows are written."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from minitron.data.part_files import PartTokens, block_name, part_pieces
from minitron.data.placing import Layout, Placer
from minitron.data.rows import shard_names
from minitron.data.shard_plans import ShardPlans
from minitron.data.shard_writing import Shard
from minitron.data.tokenising import SPLITS
from minitron.errors import MinitronError
from minitron.storage import fingerprint, join, read_json_if_exists, write_json
from minitron.storage.ranges import read_ahead


@dataclass(frozen=True)
class Finished:
    """The finished parts of a source from its first on; `ended`: there are no more."""

    parts: tuple[PartTokens, ...]
    ended: bool


@dataclass(frozen=True)
class PlaceJob:
    """folder: of the finished parts."""

    layout: Layout
    folder: str


@dataclass(frozen=True)
class Placed:
    """index: of the rows, without hashes. plans: SHA-256 of each shard's plan, by the shard's name."""

    index: dict[str, Any]
    plans: dict[str, str]

    def shards(self, layout: Layout) -> list[Shard]:
        """All shards; those of held-out rows, which are read from the most files, first."""
        result = []
        for split in reversed(SPLITS):
            rows, size = layout.rows[split], layout.seq_length * layout.dtype.itemsize
            for number, name in enumerate(shard_names(split, rows, layout.shard_rows)):
                in_shard = min(layout.shard_rows, rows - number * layout.shard_rows)
                result.append(Shard(name, self.plans[name], in_shard * size))
        return result


@dataclass(frozen=True)
class Lacking:
    """The finished parts of a source do not suffice; `source` is its number."""

    source: int


class _MorePartsNeededError(MinitronError):
    def __init__(self, source: int) -> None:
        super().__init__(f"source {source}: more parts are needed")
        self.source = source


def place_parts(job: PlaceJob, sources: Sequence[Finished]) -> Placed | Lacking:
    """Place the documents of finished parts, unless an earlier run has placed those of the same parts.

    Raises InputError if a source ends too early, the errors with which parts ended, and StorageError for damaged files.
    """
    record = join(job.folder, f"placed-{fingerprint(dict(job.layout.request))}.json")
    kept = read_json_if_exists(record)
    if kept is not None and (found := _placed_before(kept, sources)):
        return found
    plans = ShardPlans(job.folder)
    streams = [_Stream(job.folder, number, source, plans.files) for number, source in enumerate(sources)]
    placer = Placer(job.layout, plans)
    with ExitStack() as stack:
        pieces = [stack.enter_context(closing(stream.pieces())) for stream in streams]
        heldout = pieces.pop() if job.layout.heldout is not None else None
        try:
            placer.place(pieces, heldout)
        except _MorePartsNeededError as error:
            return Lacking(error.source)
    plans.close()
    placed = Placed(placer.index(), plans.written)
    read = [_described(source.parts[: stream.read]) for source, stream in zip(sources, streams, strict=True)]
    write_json(record, {"read": read, "index": placed.index, "plans": placed.plans})
    return placed


def _placed_before(kept: Mapping[str, Any], sources: Sequence[Finished]) -> Placed | Lacking | None:
    """What an earlier run has placed, or a source whose parts it had read further; None if the parts are others.

    kept: its record.
    """
    lacking: Lacking | None = None
    for number, (read, source) in enumerate(zip(kept["read"], sources, strict=True)):
        parts = _described(source.parts[: len(read)])
        if parts != read[: len(parts)] or (len(parts) < len(read) and source.ended):
            return None
        if len(parts) < len(read):
            lacking = Lacking(number)
    return lacking or Placed(kept["index"], kept["plans"])


def _described(parts: Sequence[PartTokens]) -> list[Any]:
    """Parts as JSON values."""
    return [asdict(part) | {"failure": part.failure and list(part.failure)} for part in parts]


class _Stream:
    """The pieces of a source. read: number of its parts that have been read.

    files: where the names of the blocks' files are added.
    """

    def __init__(self, folder: str, number: int, source: Finished, files: list[str]) -> None:
        self.read = 0
        self._folder = folder
        self._number = number
        self._source = source
        self._files = files

    def pieces(self) -> Generator[np.ndarray]:
        with closing(read_ahead(partial(part_pieces, self._folder), self._source.parts)) as tables:
            for part, pieces in zip(self._source.parts, tables, strict=True):
                self.read += 1
                pieces["block"] += len(self._files)
                self._files += [block_name(part.name, number) for number in range(part.blocks)]
                yield pieces
                part.raise_failure()
        if not self._source.ended:
            raise _MorePartsNeededError(self._number)
