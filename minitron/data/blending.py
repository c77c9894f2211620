"""Single documents out of the pieces of a source, so that sources can be blended document by document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from minitron.data.spans import LOCATED


class NextDocument(NamedTuple):
    """What the blend must know of a document. hash: of its text."""

    hash: bytes
    train_tokens: int
    tokens: int


class DocumentQueue:
    """The documents of a stream of pieces (dtype LOCATED), one by one. Pieces before a document that only count what was
    left out are pieces of it."""

    def __init__(self, stream: Iterator[np.ndarray]) -> None:
        self._stream = stream
        self._pieces = np.empty(0, LOCATED)  # of the documents below, and of one that is not complete
        self._ends = np.empty(0, np.int64)  # of each complete document's pieces
        self._documents: list[NextDocument] = []
        self._next = 0  # number of the document that is given next
        self._first = 0  # of those that were given, number of the first that was not taken
        self._given: list[tuple[np.ndarray, np.ndarray]] = []  # pieces, and number of pieces, of documents given before

    def next(self) -> NextDocument | None:
        """The next document; None at the end. Raises what the stream raises."""
        while self._next == len(self._documents):
            if not self._read():
                return None
        self._next += 1
        return self._documents[self._next - 1]

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of all documents that `next` has given since the last call, and the number of pieces of each document."""
        self._set_aside()
        pieces, counts = zip(*self._given, strict=True)
        self._given = []
        return np.concatenate(pieces), np.concatenate(counts)

    def blocks(self) -> set[int]:
        """The blocks of the pieces that were read and are still to be given."""
        return set(self._pieces["block"][self._start(self._next) :].tolist())

    def _start(self, document: int) -> int:
        """The number of a document's first piece."""
        return int(self._ends[document - 1]) if document else 0

    def _set_aside(self) -> None:
        start, end = self._start(self._first), self._start(self._next)
        counts = np.diff(self._ends[self._first : self._next], prepend=start)
        self._given.append((self._pieces[start:end], counts))
        self._first = self._next

    def _read(self) -> bool:
        """Read more of the stream; False at its end. All complete documents have been given."""
        more = next(self._stream, None)
        if more is None:
            return False
        self._set_aside()
        pieces = np.concatenate([self._pieces[self._start(self._next) :], more])
        self._pieces, self._ends = pieces, np.flatnonzero(pieces["last"]) + 1
        self._next = self._first = 0
        self._documents = []
        if len(self._ends):
            complete = pieces[: self._ends[-1]]
            starts = np.concatenate([[0], self._ends[:-1]])
            tokens = np.add.reduceat(complete["tokens"], starts)
            train_tokens = np.add.reduceat(complete["tokens"] * (complete["split"] == 0), starts)
            hashes = complete["hash"][complete["first"]]
            columns = (hashes.tolist(), train_tokens.tolist(), tokens.tolist())
            self._documents = [NextDocument(*values) for values in zip(*columns, strict=True)]
        return True
