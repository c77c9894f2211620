"""Where the tokens of one split are cut into rows and shards, by the lengths of its documents alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cut:
    """How some pieces of documents continue the rows.

    used: number of tokens that are used of each piece: of all pieces, unless the split is complete after fewer. begins, shards:
    positions among these tokens, int64; before the ones a row starts that is inside a document and needs its beginning, at the
    others a shard starts.
    """

    used: np.ndarray
    begins: np.ndarray
    shards: np.ndarray


class RowCutter:
    """Cuts one split.

    begin: number of tokens at the start of a row that starts inside a document.
    """

    def __init__(self, rows: int, seq_length: int, shard_rows: int, begin: int) -> None:
        self.rows = rows
        self.capacity = rows * seq_length  # tokens
        self.done = 0  # tokens in rows, also in the one that is not complete
        self.documents = 0
        self.characters = 0
        self._seq_length = seq_length
        self._shard_tokens = shard_rows * seq_length
        self._begin = begin

    @property
    def full(self) -> bool:
        return self.done == self.capacity

    @property
    def rows_done(self) -> int:
        return self.done // self._seq_length

    def cut(self, pieces: np.ndarray) -> Cut:
        """Cut the next pieces of the split (dtype PIECE, or one with its fields)."""
        nothing = np.empty(0, np.int64)
        if self.full:
            return Cut(nothing, nothing, nothing)
        ends = np.cumsum(pieces["tokens"])
        starts = ends - pieces["tokens"]
        total = int(ends[-1]) if len(ends) else 0
        if self._begin:
            used, begins, shards = self._row_by_row(total, set(starts[pieces["first"]].tolist()))
        else:
            used, begins = min(total, self.capacity - self.done), []
            shards = list(range(-self.done % self._shard_tokens, used, self._shard_tokens))
            self.done += used
        count = int(np.count_nonzero(starts < used)) if self.full else len(pieces)
        self.documents += int(np.count_nonzero(pieces["first"][:count]))
        self.characters += int(pieces["characters"][:count].sum())
        of_pieces = np.minimum(ends[:count], used) - starts[:count] if self.full else pieces["tokens"].astype(np.int64)
        return Cut(of_pieces, np.array(begins, np.int64), np.array(shards, np.int64))

    def _row_by_row(self, total: int, documents: set[int]) -> tuple[int, list[int], list[int]]:
        """Cut `total` tokens, among which documents start at these positions. Returns the number of tokens used, and the
        positions of begins and shards."""
        position = 0
        begins, shards = [], []
        while position < total and not self.full:
            if not self.done % self._seq_length:
                if not self.done % self._shard_tokens:
                    shards.append(position)
                if position not in documents:
                    begins.append(position)
                    self.done += self._begin
            more = min(self._seq_length - self.done % self._seq_length, total - position)
            position += more
            self.done += more
        return position, begins, shards
