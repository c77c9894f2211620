"""Writing one split: tokens of documents are cut into rows, and rows written to shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minitron.data.rows import Split, shard_name


class RowWriter:
    """Writes one split: full rows are written, an incomplete row is kept until more tokens come.

    begin: token ids at the start of a row that starts inside a document. written: called with each shard that is complete.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        rows: int,
        begin: tuple[int, ...],
        seq_length: int,
        shard_rows: int,
        dtype: np.dtype,
        written: Callable[[Path], None],
    ) -> None:
        self.folder = folder
        self.split = split
        self.rows = rows
        self.capacity = rows * seq_length  # tokens
        self.done = 0  # tokens written
        self.documents = 0
        self.characters = 0
        self._seq_length = seq_length
        self._shard_tokens = shard_rows * seq_length
        self._begin = np.asarray(begin, dtype)
        self._incomplete = np.empty(0, dtype)  # the row that is being filled
        self._sha = hashlib.sha256()
        self._file: Any = None
        self._written = written

    @property
    def full(self) -> bool:
        return self.done == self.capacity

    @property
    def rows_done(self) -> int:
        return self.done // self._seq_length

    def add(self, tokens: np.ndarray, pieces: np.ndarray) -> np.ndarray:
        """Add the next tokens of the split, of these pieces (dtype PIECE). Returns the number of tokens of each piece that
        was used: of all pieces, unless the split is complete after fewer."""
        if self.full:
            return np.empty(0, np.int64)
        tokens = tokens.astype(self._begin.dtype, copy=False)
        ends = np.cumsum(pieces["tokens"])
        starts = ends - pieces["tokens"]
        begins = np.zeros(len(tokens) + 1, bool)
        begins[starts[pieces["first"]]] = True
        used = self._add_row_by_row(tokens, begins) if len(self._begin) else self._add_whole_rows(tokens)
        count = int(np.count_nonzero(starts < used)) if self.full else len(pieces)
        self.documents += int(np.count_nonzero(pieces["last"][:count]))
        self.characters += int(pieces["characters"][:count].sum())
        return np.minimum(ends[:count], used) - starts[:count] if self.full else pieces["tokens"]

    def _add_whole_rows(self, tokens: np.ndarray) -> int:
        """Add tokens that are cut into rows as they are. Returns how many of them are in complete rows."""
        kept = len(self._incomplete)
        tokens = np.concatenate([self._incomplete, tokens])
        whole = min(len(tokens) // self._seq_length * self._seq_length, self.capacity - self.done)
        self._write(tokens[:whole])
        self._incomplete = tokens[whole:].copy()
        return whole - kept

    def _add_row_by_row(self, tokens: np.ndarray, begins: np.ndarray) -> int:
        """Add tokens that are cut into rows, with `begin` in front of a row that starts inside a document. begins: whether a
        document begins at each token. Returns how many are used if the split is complete."""
        row, position = self._incomplete, 0
        rows: list[np.ndarray] = []
        needed = self.rows - self.rows_done
        while position < len(tokens) and len(rows) < needed:
            if not len(row) and not begins[position]:
                row = self._begin
            more = tokens[position : position + self._seq_length - len(row)]
            row = np.concatenate([row, more]) if len(row) else more
            position += len(more)
            if len(row) == self._seq_length:
                rows.append(row)
                row = row[:0]
        self._write(np.concatenate(rows) if rows else row[:0])
        self._incomplete = row.copy()
        return position

    def _write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            number, used = divmod(self.done, self._shard_tokens)
            if used == 0:
                self.close()
                self._file = open(self.folder / shard_name(self.split, number), "wb")  # noqa: SIM115
            part = tokens[: self._shard_tokens - used]
            self._file.write(part.tobytes())
            self._sha.update(part.tobytes())
            self.done += len(part)
            tokens = tokens[len(part) :]

    def close(self) -> None:
        """Finish the last shard."""
        if self._file is not None:
            self._file.close()
            self._written(Path(self._file.name))
            self._file = None

    def summary(self) -> dict[str, Any]:
        """What the index says of the split."""
        return {
            "rows": self.rows_done,
            "documents": self.documents,
            "characters": self.characters,
            "sha256": self._sha.hexdigest(),
        }
