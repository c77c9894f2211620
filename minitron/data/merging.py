"""From the chunks of one or several sources to rows: sources are blended by weight, equal documents dropped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minitron.data.blending import DocumentQueue, WholeDocument, joined
from minitron.data.row_writer import RowWriter
from minitron.data.rows import FORMAT, INDEX, Split
from minitron.data.seen import SeenHashes
from minitron.data.special_tokens import DocumentTokens
from minitron.data.tokenising import SPLITS, Chunk
from minitron.errors import InputError, MinitronError
from minitron.storage import disk_errors, is_local, publish, staging_folder, upload, write_json

Chunks = Iterator[Chunk]
REASONS = ("", "duplicates", "in_heldout")  # why a document is dropped
BLEND_TOKENS = 2**20  # tokens of blended documents that are written together


@dataclass(frozen=True)
class Layout:
    """What the rows consist of; it can be pickled.

    sources, weights: name and weight of each source. own_heldout: whether the held-out rows have a source of their own.
    request: what the index records of the settings.
    """

    sources: tuple[str, ...]
    weights: tuple[float, ...]
    own_heldout: bool
    drop_duplicates: bool
    around: DocumentTokens
    seq_length: int
    rows: Mapping[Split, int]
    shard_rows: int
    dtype: np.dtype
    vocab_size: int
    request: Mapping[str, Any]


@dataclass
class _Counts:
    """Documents that are not in the rows, and tokens by source and split."""

    missing: int = 0
    length: int = 0
    duplicates: int = 0
    in_heldout: int = 0
    tokens: list[dict[str, int]] = field(default_factory=list)
    """Of each source, and of the held-out text if it has a source of its own."""

    def left_out(self) -> dict[str, int]:
        """The documents that are not in the rows, by reason; reasons that left out none are not named."""
        counts = {name: getattr(self, name) for name in ("missing", "length", "duplicates", "in_heldout")}
        return {name: count for name, count in counts.items() if count}


def write_rows(
    layout: Layout,
    target: str,
    streams: Callable[[Callable[[Split], bool]], tuple[Sequence[Chunks], Chunks | None]],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the rows of `layout` and their index into the folder `target`, which is complete or does not exist.

    streams: gives the chunks of each source, and those of the held-out text if that has a source of its own; its argument tells
    whether a split needs no more text. Shards are copied to a remote target as soon as they are complete.

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
            merger = Merger(layout, folder, written, progress)
            write_json(str(folder / INDEX), merger.write(*streams(merger.full)))
            publish(folder, target, entries | upload(folder, target, INDEX), {"kind": "rows"})
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class Merger:
    """Writes the rows of all splits into a local folder.

    written: called with each shard that is complete. progress: called with (tokens written, tokens in total).
    """

    def __init__(
        self,
        layout: Layout,
        folder: Path,
        written: Callable[[Path], None],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.layout = layout
        self.writers = {
            split: RowWriter(
                folder,
                split,
                layout.rows[split],
                layout.around.begin,
                layout.seq_length,
                layout.shard_rows,
                layout.dtype,
                written,
            )
            for split in SPLITS
        }
        self.progress = progress
        self.counts = _Counts(tokens=[dict.fromkeys(SPLITS, 0) for _ in (*layout.sources, "heldout")])
        self._seen = SeenHashes() if layout.drop_duplicates else None
        self._heldout = SeenHashes()
        self._last_reason = 0  # why the document that the next chunk may continue is dropped
        self._texts: set[bytes] = set()  # hashes of the first documents, at most two

    def full(self, split: Split) -> bool:
        """Whether a split has all its rows."""
        return self.writers[split].full

    def write(self, streams: Sequence[Chunks], heldout: Chunks | None) -> dict[str, Any]:
        """Write all rows and return their index. streams: the chunks of each source. heldout: those of the held-out text, if
        that has a source of its own.

        Raises InputError if a source ends too early, and what a stream raises before the rows are complete.
        """
        if heldout is not None:
            self._write_heldout(heldout)
        if len(streams) == 1:
            self._write_source(streams[0])
        else:
            self._write_blend([DocumentQueue(stream) for stream in streams])
        for writer in self.writers.values():
            writer.close()
        return self._index()

    @property
    def _complete(self) -> bool:
        return all(writer.full for writer in self.writers.values())

    def _write_heldout(self, chunks: Chunks) -> None:
        writer = self.writers["heldout"]
        hashes = SeenHashes()
        for chunk in chunks:
            sources = np.full(len(chunk.pieces), len(self.layout.sources))
            last = self._add(chunk, sources, self._reasons(chunk.pieces), [writer])
            pieces = chunk.pieces[: last + 1]
            for value in pieces["hash"][pieces["first"]].tolist():
                hashes.add(value)
            if writer.full:
                self._heldout = hashes
                return
        rows = f"{writer.rows_done} of {writer.rows} held-out rows (from {writer.documents} documents)"
        raise InputError(f"the held-out text ends after {rows}", _lower("heldout_rows", writer.rows_done))

    def _write_source(self, chunks: Chunks) -> None:
        for chunk in chunks:
            self._add(chunk, np.zeros(len(chunk.pieces), np.int64), self._reasons(chunk.pieces))
            if self._complete:
                return
        raise self._too_little()

    def _write_blend(self, queues: list[DocumentQueue]) -> None:
        """Take each document from the source that has given the fewest training tokens for its weight."""
        taken = [0.0] * len(queues)
        waiting: list[WholeDocument] = []
        size = 0  # tokens in them
        labels: list[tuple[int, int]] = []  # source and reason of each document
        while not self._complete:
            source = min(range(len(queues)), key=taken.__getitem__)
            failure: MinitronError | None = None
            try:
                document = queues[source].next()
            except MinitronError as error:  # raised below, unless the rows are complete without it
                failure, document = error, None
            if document is not None:
                reason = self._reason(document.hash)
                if not reason:  # the held-out documents of each source are a random sample of it
                    taken[source] += document.train_tokens / self.layout.weights[source]
                waiting.append(document)
                labels.append((source, reason))
                size += document.tokens
            if document is None or size >= BLEND_TOKENS:
                of_pieces = np.repeat(
                    np.array(labels, np.int64).reshape(-1, 2), [len(one.pieces) for one in waiting], axis=0
                )
                self._add(joined(waiting), of_pieces[:, 0], of_pieces[:, 1])
                waiting, labels, size = [], [], 0
            if document is None and not self._complete:
                raise failure or self._source_ends(source)

    def _reason(self, value: bytes) -> int:
        """Why the next document, with this hash, is dropped: an index into REASONS; 0 if it is not."""
        if value in self._heldout:
            return REASONS.index("in_heldout")
        if self._seen is not None and not self._seen.add(value):
            return REASONS.index("duplicates")
        return 0

    def _reasons(self, pieces: np.ndarray) -> np.ndarray | None:
        """The reason of each piece of the next chunk; None if no document can be dropped."""
        if self._seen is None and not self.layout.own_heldout:
            return None
        reasons = [self._last_reason, *map(self._reason, pieces["hash"][pieces["first"]].tolist())]
        self._last_reason = reasons[-1]
        return np.array(reasons)[np.cumsum(pieces["first"])]

    def _add(
        self, chunk: Chunk, sources: np.ndarray, reasons: np.ndarray | None, until: Sequence[RowWriter] = ()
    ) -> int:
        """Add the next chunk. sources, reasons: of each piece, the number of its source and why it is dropped. until: the
        writers after which no more chunks are read, by default all. Returns the number of the last piece that they needed."""
        pieces = chunk.pieces
        if len(self._texts) < 2:
            self._texts |= set(pieces["hash"][pieces["first"]][:100].tolist())
        if reasons is not None and reasons.any():
            chunk = chunk.select(reasons == 0)
        last = -1
        for number, split in enumerate(SPLITS):
            writer = self.writers[split]
            if writer.full:
                continue
            mine = np.flatnonzero(pieces["split"] == number)
            used = writer.add(chunk.tokens[split], chunk.pieces[mine])
            counted = mine[: len(used)]
            for source in np.unique(sources[counted]):
                self.counts.tokens[source][split] += int(used[sources[counted] == source].sum())
            if reasons is not None:
                dropped = reasons[counted][pieces["first"][counted]]
                self.counts.duplicates += int(np.count_nonzero(dropped == REASONS.index("duplicates")))
                self.counts.in_heldout += int(np.count_nonzero(dropped == REASONS.index("in_heldout")))
            last = max(last, *counted[-1:].tolist(), -1)
        if not all(writer.full for writer in until or self.writers.values()):
            last = len(pieces) - 1
        self.counts.missing += int(pieces["missing"][: last + 1].sum())
        self.counts.length += int(pieces["length"][: last + 1].sum())
        self._report()
        return last

    def _report(self) -> None:
        if self.progress:
            writers = self.writers.values()
            self.progress(sum(writer.done for writer in writers), sum(writer.capacity for writer in writers))

    def _too_little(self) -> InputError:
        """The error for a source that ends before the rows are complete."""
        writers = self.writers.values()
        rows = " and ".join(f"{writer.rows_done} of {writer.rows} {writer.split} rows" for writer in writers)
        documents = " and ".join(f"{writer.documents} {writer.split} documents" for writer in writers)
        problem = f"the source ends after {rows} (from {documents})"
        lacking = [writer for writer in writers if not writer.full]
        count = sum(writer.documents for writer in writers)
        if count == 0:
            return InputError(f"{problem}: there is no document with text in it", "give other text")
        if count > 1 and len(self._texts) == 1 and any(not writer.documents for writer in lacking):
            return InputError(
                f"{problem}: all {count} documents have the same text, which is in one split only", "give other text"
            )
        if count == 1 and any(not writer.documents for writer in lacking):
            return InputError(
                f"{problem}: a document belongs to one split as a whole, and there is only one",
                "divide the text into documents: one per line of a jsonl file, or separator for kind: text",
            )
        if any(not writer.documents for writer in lacking if writer.split == "heldout"):
            return InputError(problem, "raise heldout_fraction, or give more text")
        remedies = [_lower(f"{writer.split}_rows", writer.rows_done) for writer in lacking]
        return InputError(problem, ", and ".join(remedies) + ", or give more text")

    def _source_ends(self, source: int) -> InputError:
        """The error for a source of a blend that ends before the rows are complete."""
        share = self.layout.weights[source] / sum(self.layout.weights)
        tokens = sum(self.counts.tokens[source].values())
        rows = " and ".join(f"{w.rows_done} of {w.rows} {w.split} rows" for w in self.writers.values())
        train = self.writers["train"]
        return InputError(
            f"{self.layout.sources[source]}: ends after {tokens:,} tokens, {share:.1%} of {rows}",
            f"lower its weight, or {_lower('train_rows', train.rows_done)}, or give more text",
        )

    def _index(self) -> dict[str, Any]:
        index: dict[str, Any] = {
            "format": FORMAT,
            "seq_length": self.layout.seq_length,
            "dtype": self.layout.dtype.str,
            "shard_rows": self.layout.shard_rows,
            "vocab_size": self.layout.vocab_size,
            "splits": {split: writer.summary() for split, writer in self.writers.items()},
            "request": dict(self.layout.request),
        }
        if len(self.layout.sources) > 1:
            names = zip(self.layout.sources, self.counts.tokens, strict=False)
            index["sources"] = [{"source": source, "tokens": tokens} for source, tokens in names]
        if left_out := self.counts.left_out():
            index["left_out"] = left_out
        return index


def _lower(name: str, rows: int) -> str:
    return f"lower {name} to {rows}" if rows else f"lower {name} or seq_length"
