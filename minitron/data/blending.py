"""Single documents out of streams of chunks, and back into chunks, so that sources can be blended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minitron.data.rows import Split
from minitron.data.tokenising import PIECE, SPLITS, Chunk


@dataclass(frozen=True)
class WholeDocument:
    """All pieces of one document, with the tokens of each split; before it, pieces that only count what was left out."""

    pieces: np.ndarray
    parts: list[tuple[Split, np.ndarray]]
    tokens: int
    hash: bytes

    @property
    def train_tokens(self) -> int:
        return sum(len(part) for split, part in self.parts if split == "train")


class DocumentQueue:
    """The documents of a stream of chunks, one by one."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks = chunks
        self._chunk: Chunk | None = None
        self._next = 0
        self._offsets: list[int] = []  # of each piece's tokens among those of its split

    def next(self) -> WholeDocument | None:
        """The next document; None at the end. Raises what the stream raises."""
        pieces, parts, tokens = [], [], 0
        value = b""
        while True:
            if self._chunk is None or self._next == len(self._chunk.pieces):
                self._chunk = next(self._chunks, None)
                if self._chunk is None:
                    return None
                self._next, self._offsets = 0, _offsets(self._chunk.pieces)
            index = self._next
            self._next += 1
            piece = self._chunk.pieces[index : index + 1]
            pieces.append(piece)
            length = int(piece["tokens"][0])
            if piece["first"][0]:
                value = piece["hash"][0]
            if length:
                split = SPLITS[piece["split"][0]]
                start = self._offsets[index]
                parts.append((split, self._chunk.tokens[split][start : start + length]))
                tokens += length
            if piece["last"][0]:
                return WholeDocument(np.concatenate(pieces) if len(pieces) > 1 else piece, parts, tokens, value)


def _offsets(pieces: np.ndarray) -> list[int]:
    offsets = np.zeros(len(pieces), np.int64)
    for number in range(len(SPLITS)):
        mine = pieces["split"] == number
        offsets[mine] = np.cumsum(pieces["tokens"][mine]) - pieces["tokens"][mine]
    return [int(offset) for offset in offsets]


def joined(documents: list[WholeDocument]) -> Chunk:
    """Documents as one chunk."""
    tokens = {}
    for split in SPLITS:
        parts = [part for document in documents for of, part in document.parts if of == split]
        tokens[split] = np.concatenate(parts) if parts else np.empty(0, np.uint16)
    pieces = [document.pieces for document in documents]
    return Chunk(np.concatenate(pieces) if pieces else np.empty(0, PIECE), tokens)
