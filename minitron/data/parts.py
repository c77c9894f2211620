"""Parts of a text source, which can be read independently; in order, their documents are those of the source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from minitron.data import hub
from minitron.data.compression import is_compressed
from minitron.data.readers import Range
from minitron.data.source_files import check_path, reading_order, source_files
from minitron.data.sources import TextSource

PART_BYTES = 32 * 2**20
"""Size of a part of a source in bytes on disk: about ten seconds of work, which is lost when a worker dies."""
DIVISIBLE = ("jsonl", "parquet")  # kinds whose files can be read in ranges of bytes


@dataclass(frozen=True)
class Part:
    """A part of a source. Equal parts of equal sources have the same documents."""

    files: tuple[tuple[str, str, Range], ...] = ()
    """(path, name, range) of each file."""
    shard: tuple[int, int] = (0, 1)
    """For hub: the number of the shard, and the number of shards."""
    commit: str | None = None
    """For hub: what the revision resolved to when the source was divided."""
    bytes: int | None = field(default=None, compare=False)
    """Size on disk; None if it is not known."""


def whole(source: TextSource) -> Part:
    """All of a source as one part. Raises InputError or StorageError if its files do not exist or cannot be listed."""
    if source.kind == "hub":
        check_path(source)
        return Part(commit=source.revision)
    if source.kind == "python-docs":
        return Part()
    ordered = reading_order(list(source_files(source)[1]))
    return Part(tuple((path, name, Range()) for path, name in ordered))


def source_parts(source: TextSource) -> Iterator[Part]:
    """The parts of a source in order: files of about PART_BYTES, ranges of larger files of DIVISIBLE kinds that are not
    compressed, shards of a dataset on the hub; all of python-docs. The source alone decides what they are.

    Raises InputError or StorageError if its files do not exist or cannot be listed.
    """
    if source.kind == "python-docs":
        yield whole(source)
    elif source.kind == "hub":
        yield from _shards(source)
    else:
        files = source_files(source)[1]
        pending: list[tuple[str, str, Range]] = []
        size = 0
        for path, name in reading_order(list(files)):
            file_bytes = int(files[path]["size"] or 0)
            divisible = source.kind in DIVISIBLE and (source.kind == "parquet" or not is_compressed(path))
            if pending and size + file_bytes > PART_BYTES:
                yield Part(tuple(pending), bytes=size)
                pending, size = [], 0
            if divisible and file_bytes > PART_BYTES:
                starts = [*range(0, file_bytes, PART_BYTES)]
                for start in starts:
                    end = None if start == starts[-1] else start + PART_BYTES
                    yield Part(((path, name, Range(start, end)),), bytes=min(PART_BYTES, file_bytes - start))
            else:
                pending.append((path, name, Range()))
                size += file_bytes
        if pending:
            yield Part(tuple(pending), bytes=size)


def _shards(source: TextSource) -> Iterator[Part]:
    check_path(source)
    local = hub.is_local_folder(source.path)
    commit = source.revision if local else hub.commit(source.path, source.revision)
    shards = hub.num_shards(source.path, source.name, source.split, commit)
    for shard in range(shards):
        yield Part(shard=(shard, shards), commit=commit)
