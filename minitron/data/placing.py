"""Which documents are in the rows, and where: sources are blended by weight, equal documents dropped, rows cut.

It goes by the tables of pieces alone, and is the part of packing that has to go from the first document to the last. The tokens
can then be copied shard by shard, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from minitron.data.blending import DocumentQueue
from minitron.data.row_cutter import RowCutter
from minitron.data.rows import FORMAT, Split
from minitron.data.seen import SeenHashes
from minitron.data.spans import spans_of
from minitron.data.special_tokens import DocumentTokens
from minitron.data.tokenising import SPLITS
from minitron.errors import InputError, MinitronError

Pieces = Iterator[np.ndarray]  # tables of dtype LOCATED
REASONS = ("", "duplicates", "in_heldout")  # why a document is dropped
COUNTED = ("missing", "length", "duplicates", "in_heldout")  # why a document is not in the rows
BLEND_TOKENS = 2**20  # tokens of blended documents that are placed together


@dataclass(frozen=True)
class Layout:
    """What the rows consist of; it can be pickled.

    sources, weights: name and weight of each source. heldout: name of the source of the held-out rows, if they have their own.
    request: what the index records of the settings. ends_inside: whether the end-of-text token may also be inside a document.
    """

    sources: tuple[str, ...]
    weights: tuple[float, ...]
    heldout: str | None
    drop_duplicates: bool
    around: DocumentTokens
    seq_length: int
    rows: Mapping[Split, int]
    shard_rows: int
    dtype: np.dtype
    vocab_size: int
    request: Mapping[str, Any]
    ends_inside: bool = False


@dataclass(frozen=True)
class Placement:
    """The next tokens of a split.

    spans: where they are, of dtype SPAN. begins: positions among them at which a row starts that is inside a document; the
    tokens that begin a document are inserted there. shards: positions at which a shard starts.
    """

    spans: np.ndarray
    begins: np.ndarray
    shards: np.ndarray


class Sink(Protocol):
    """Takes the tokens of all splits, in order."""

    def place(self, split: Split, placement: Placement) -> None:
        """Take the next tokens of a split."""

    def keep(self, blocks: Set[int]) -> None:
        """Forget the blocks that were read, except these: no more tokens come from the others."""


class Placer:
    """Places the documents of all splits.

    progress: called with (tokens placed, tokens in total).
    """

    def __init__(self, layout: Layout, sink: Sink, progress: Callable[[int, int], None] | None = None) -> None:
        self.layout = layout
        self.sink = sink
        self.progress = progress
        begin = len(layout.around.begin)
        self.cutters = {
            split: RowCutter(layout.rows[split], layout.seq_length, layout.shard_rows, begin) for split in SPLITS
        }
        sources = len(layout.sources) + 1  # the last is the held-out text, if that has a source of its own
        self._tokens = np.zeros((sources, len(SPLITS)), np.int64)
        self._documents = np.zeros((sources, len(SPLITS)), np.int64)
        self._left_out = {reason: np.zeros(sources, np.int64) for reason in COUNTED}
        self._seen = SeenHashes() if layout.drop_duplicates else None
        self._heldout = SeenHashes()
        self._last_reason = 0  # why the document that the next pieces may continue is dropped
        self._texts: set[bytes] = set()  # hashes of the first documents, at most two

    def full(self, split: Split) -> bool:
        """Whether a split has all its rows."""
        return self.cutters[split].full

    def place(self, streams: Sequence[Pieces], heldout: Pieces | None) -> None:
        """Place all rows. streams: the pieces of each source. heldout: those of the held-out text, if that has a source of its
        own.

        Raises InputError if a source ends too early, and what a stream raises before the rows are complete.
        """
        if heldout is not None:
            self._place_heldout(heldout)
        if len(streams) == 1:
            self._place_source(streams[0])
        else:
            self._place_blend([DocumentQueue(stream) for stream in streams])

    @property
    def _complete(self) -> bool:
        return all(cutter.full for cutter in self.cutters.values())

    def _place_heldout(self, stream: Pieces) -> None:
        cutter = self.cutters["heldout"]
        hashes = SeenHashes()
        for pieces in stream:
            sources = np.full(len(pieces), len(self.layout.sources))
            last = self._add(pieces, sources, self._reasons(pieces), [cutter])
            self.sink.keep(set())
            pieces = pieces[: last + 1]
            for value in pieces["hash"][pieces["first"]].tolist():
                hashes.add(value)
            if cutter.full:
                self._heldout = hashes
                if self._seen is not None:
                    self._seen = SeenHashes()  # it has documents that were read, and are not held out
                return
        rows = f"{cutter.rows_done} of {cutter.rows} held-out rows (from {cutter.documents} documents)"
        raise InputError(f"the held-out text ends after {rows}", _lower("heldout", cutter.rows_done))

    def _place_source(self, stream: Pieces) -> None:
        for pieces in stream:
            self._add(pieces, np.zeros(len(pieces), np.int64), self._reasons(pieces))
            self.sink.keep(set())
            if self._complete:
                return
        raise self._too_little()

    def _place_blend(self, queues: list[DocumentQueue]) -> None:
        """Take each document from the source that has given the fewest training tokens for its weight."""
        taken = [0.0] * len(queues)
        sources: list[int] = []  # of each document that waits
        reasons: list[int] = []
        size = 0  # tokens in them
        while not self._complete:
            source = taken.index(min(taken))
            failure: MinitronError | None = None
            try:
                document = queues[source].next()
            except MinitronError as error:  # raised below, unless the rows are complete without it
                failure, document = error, None
            if document is not None:
                reason = self._reason(document.hash)
                if not reason:  # the held-out documents of each source are a random sample of it
                    taken[source] += document.train_tokens / self.layout.weights[source]
                sources.append(source)
                reasons.append(reason)
                size += document.tokens
            if document is None or size >= BLEND_TOKENS:
                self._add_documents(queues, np.array(sources, np.int64), np.array(reasons, np.int64))
                sources, reasons, size = [], [], 0
            if document is None and not self._complete:
                raise failure or self._source_ends(source)

    def _add_documents(self, queues: list[DocumentQueue], sources: np.ndarray, reasons: np.ndarray) -> None:
        """Add the documents that the queues have given. sources, reasons: of each, in the order in which they were given."""
        tables, documents = [], []
        for number, queue in enumerate(queues):
            pieces, counts = queue.take()
            tables.append(pieces)
            documents.append(np.repeat(np.flatnonzero(sources == number), counts))
        of_pieces = np.concatenate(documents)
        order = np.argsort(of_pieces, kind="stable")
        of_pieces = of_pieces[order]
        self._add(np.concatenate(tables)[order], sources[of_pieces], reasons[of_pieces])
        self.sink.keep(set().union(*(queue.blocks() for queue in queues)))

    def _reason(self, value: bytes) -> int:
        """Why the next document, with this hash, is dropped: an index into REASONS; 0 if it is not."""
        if self.layout.heldout is not None and value in self._heldout:
            return REASONS.index("in_heldout")
        if self._seen is not None and not self._seen.add(value):
            return REASONS.index("duplicates")
        return 0

    def _reasons(self, pieces: np.ndarray) -> np.ndarray | None:
        """The reason of each of the next pieces; None if no document can be dropped."""
        if self._seen is None and self.layout.heldout is None:
            return None
        reasons = [self._last_reason, *map(self._reason, pieces["hash"][pieces["first"]].tolist())]
        self._last_reason = reasons[-1]
        return np.array(reasons)[np.cumsum(pieces["first"])]

    def _add(
        self, pieces: np.ndarray, sources: np.ndarray, reasons: np.ndarray | None, until: Sequence[RowCutter] = ()
    ) -> int:
        """Add the next pieces. sources, reasons: of each piece, the number of its source and why it is dropped. until: the
        cutters after which no more pieces are read, by default all. Returns the number of the last piece that they needed."""
        if len(self._texts) < 2:
            self._texts |= set(pieces["hash"][pieces["first"]][:100].tolist())
        kept = pieces
        if reasons is not None and reasons.any():
            kept = pieces.copy()
            for field in ("tokens", "characters", "first", "last"):
                kept[field][reasons != 0] = 0
        until = until or [*self.cutters.values()]
        last = -1
        for number, split in enumerate(SPLITS):
            cutter = self.cutters[split]
            if cutter.full:
                continue
            mine = np.flatnonzero(pieces["split"] == number)
            cut = cutter.cut(kept[mine])
            counted = mine[: len(cut.used)]
            self.sink.place(split, Placement(spans_of(kept[counted], cut.used), cut.begins, cut.shards))
            np.add.at(self._tokens[:, number], sources[counted], cut.used)
            np.add.at(self._documents[:, number], sources[counted], kept["first"][counted])
            if reasons is not None:
                for reason, name in enumerate(REASONS):
                    if reason:
                        dropped = pieces["first"][counted] & (reasons[counted] == reason)
                        np.add.at(self._left_out[name], sources[counted], dropped)
            if cutter in until:  # a piece that only counts what was left out is of the first split
                last = max(last, *counted[-1:].tolist(), -1)
        if not all(cutter.full for cutter in until):
            last = len(pieces) - 1
        for name in ("missing", "length"):
            np.add.at(self._left_out[name], sources[: last + 1], pieces[name][: last + 1])
        self._report()
        return last

    def _report(self) -> None:
        if self.progress:
            cutters = self.cutters.values()
            self.progress(sum(cutter.done for cutter in cutters), sum(cutter.capacity for cutter in cutters))

    def _too_little(self) -> InputError:
        """The error for a source that ends before the rows are complete."""
        cutters = self.cutters
        rows = " and ".join(f"{cutter.rows_done} of {cutter.rows} {split} rows" for split, cutter in cutters.items())
        documents = " and ".join(f"{cutter.documents} {split} documents" for split, cutter in cutters.items())
        problem = f"the source ends after {rows} (from {documents})"
        lacking = {split: cutter for split, cutter in cutters.items() if not cutter.full}
        count = sum(cutter.documents for cutter in cutters.values())
        if count == 0:
            return InputError(f"{problem}: there is no document with text in it", "give other text")
        if count > 1 and len(self._texts) == 1 and any(not cutter.documents for cutter in lacking.values()):
            return InputError(
                f"{problem}: all {count} documents have the same text, which is in one split only", "give other text"
            )
        if count == 1 and any(not cutter.documents for cutter in lacking.values()):
            return InputError(
                f"{problem}: a document belongs to one split as a whole, and there is only one",
                "divide the text into documents: one per line of a jsonl file, or separator for kind: text",
            )
        if "heldout" in lacking and not lacking["heldout"].documents:
            return InputError(problem, "raise heldout_fraction, or give more text")
        remedies = [_lower(split, cutter.rows_done) for split, cutter in lacking.items()]
        return InputError(problem, ", and ".join(remedies) + ", or give more text")

    def _source_ends(self, source: int) -> InputError:
        """The error for a source of a blend that ends before the rows are complete."""
        share = self.layout.weights[source] / sum(self.layout.weights)
        tokens = int(self._tokens[source].sum())
        rows = " and ".join(f"{c.rows_done} of {c.rows} {split} rows" for split, c in self.cutters.items())
        return InputError(
            f"{self.layout.sources[source]}: ends after {tokens:,} tokens, {share:.1%} of {rows}",
            f"lower its weight, or {_lower('train', self.cutters['train'].rows_done)}, or give more text",
        )

    def index(self) -> dict[str, Any]:
        """The index of the rows, without the hashes of their splits."""
        names = [*self.layout.sources, *([self.layout.heldout] if self.layout.heldout is not None else [])]
        index: dict[str, Any] = {
            "format": FORMAT,
            "seq_length": self.layout.seq_length,
            "dtype": self.layout.dtype.str,
            "shard_rows": self.layout.shard_rows,
            "vocab_size": self.layout.vocab_size,
            "splits": {
                split: {"rows": cutter.rows_done, "documents": cutter.documents, "characters": cutter.characters}
                for split, cutter in self.cutters.items()
            },
            "request": dict(self.layout.request),
            "sources": [self._counts(number, name) for number, name in enumerate(names)],
        }
        if self.layout.ends_inside:
            index["ends_inside"] = True
        if left_out := _named({reason: int(counts.sum()) for reason, counts in self._left_out.items()}):
            index["left_out"] = left_out
        return index

    def _counts(self, number: int, name: str) -> dict[str, Any]:
        """What of a source is in the rows, and what is not."""
        return {
            "source": name,
            "heldout": number == len(self.layout.sources),
            "tokens": dict(zip(SPLITS, self._tokens[number].tolist(), strict=True)),
            "documents": dict(zip(SPLITS, self._documents[number].tolist(), strict=True)),
            "left_out": _named({reason: int(counts[number]) for reason, counts in self._left_out.items()}),
        }


def _named(counts: dict[str, int]) -> dict[str, int]:
    """Reasons that left out no document are not named."""
    return {reason: count for reason, count in counts.items() if count}


def _lower(split: str, rows: int) -> str:
    return f"lower {split}_rows to {rows}" if rows else f"lower {split}_rows or seq_length"
