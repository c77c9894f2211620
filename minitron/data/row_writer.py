"""Writing rows in one process, while the text is read."""

from __future__ import annotations

from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import numpy as np

from minitron.data.placing import Layout, Placement
from minitron.data.rows import Split, shard_name
from minitron.data.tokenising import SPLITS


def with_begins(tokens: np.ndarray, begins: np.ndarray, begin: tuple[int, ...]) -> np.ndarray:
    """Tokens with `begin` inserted before each of these positions."""
    if not len(begins):
        return tokens
    values = np.tile(np.array(begin, tokens.dtype), len(begins))
    return np.insert(tokens, np.repeat(begins, len(begin)), values)


class RowWriter:
    """A `Sink` that writes all splits into shards in a local folder. `blocks` has the tokens of the blocks that were read.

    written: called with each shard that is complete.
    """

    def __init__(self, layout: Layout, folder: Path, written: Callable[[Path], None]) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self._begin = layout.around.begin
        self._files = {split: _ShardFiles(layout, folder, split, written) for split in SPLITS}

    def place(self, split: Split, placement: Placement) -> None:
        spans = placement.spans.tolist()
        if spans:
            tokens = np.concatenate([self.blocks[block][start : start + count] for block, start, count in spans])
            self._files[split].write(with_begins(tokens, placement.begins, self._begin))

    def keep(self, blocks: Set[int]) -> None:
        self.blocks = {number: tokens for number, tokens in self.blocks.items() if number in blocks}

    def close(self) -> None:
        """Finish the last shards."""
        for files in self._files.values():
            files.close()


class _ShardFiles:
    """The shards of a split, one after the other."""

    def __init__(self, layout: Layout, folder: Path, split: Split, written: Callable[[Path], None]) -> None:
        self._folder = folder
        self._split = split
        self._shard_tokens = layout.shard_rows * layout.seq_length
        self._done = 0  # tokens
        self._file: Any = None
        self._written = written

    def write(self, tokens: np.ndarray) -> None:
        """Write the next tokens."""
        while len(tokens):
            number, used = divmod(self._done, self._shard_tokens)
            if used == 0:
                self.close()
                self._file = open(self._folder / shard_name(self._split, number), "wb")  # noqa: SIM115
            part = tokens[: self._shard_tokens - used]
            self._file.write(part.tobytes())
            self._done += len(part)
            tokens = tokens[len(part) :]

    def close(self) -> None:
        """Finish the last shard."""
        if self._file is not None:
            self._file.close()
            self._written(Path(self._file.name))
            self._file = None
