"""Fixed-length rows of token ids, read from memory-mapped shards, and the choice of rows for each training step.

Rows are addressed by number. The rows of step `n` are a pure function of the seed and `n`: resuming needs no state but the
step, with any number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch

from minitron import storage
from minitron.arguments import check_type
from minitron.data.boundaries import DocumentBoundaries
from minitron.errors import InputError, MissingFileError, StorageError
from minitron.storage import fetch, fingerprint, is_committed, join, read_json

Split = Literal["train", "heldout"]
INDEX = "index.json"
FORMAT = 1


def shard_name(split: str, number: int) -> str:
    """The file name of a shard, for example train-00000.bin."""
    return f"{split}-{number:05d}.bin"


def number_of_shards(rows: int, shard_rows: int) -> int:
    """The number of shards of a split."""
    return -(-rows // shard_rows)


def shard_names(split: str, rows: int, shard_rows: int) -> list[str]:
    """The file names of all shards of a split."""
    return [shard_name(split, number) for number in range(number_of_shards(rows, shard_rows))]


def content_hash(split: str, rows: int, shard_rows: int, entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The hash of a split: the SHA-256 of its shard, or of the SHA-256s of several, which may be written at the same time.

    entries: of the shards in the manifest.
    """
    hashes = [entries[name]["sha256"] for name in shard_names(split, rows, shard_rows)]
    return str(hashes[0]) if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


@dataclass(frozen=True)
class SourceCounts:
    """What of a source of text is in the rows.

    source: kind and path. heldout: whether it is the held-out text's own source. tokens, documents: in each split. left_out:
    number of documents that are not in the rows, by reason, see `minitron.data.pack`.
    """

    source: str
    heldout: bool
    tokens: Mapping[str, int]
    documents: Mapping[str, int]
    left_out: Mapping[str, int]


class Rows:
    """One split of a folder that `minitron.data.pack` wrote; create it with `Rows.open`.

    seq_length: tokens per row. vocab_size: one more than the largest token id of the tokenizer. fingerprint: a hash of the
    split's content. Pickling stores the folder and the split; unpickling opens the folder again.
    """

    def __init__(self, folder: str, local: str, split: Split, index: dict[str, Any]) -> None:
        self.folder = folder
        self.split = split
        self.index = index
        self.seq_length: int = index["seq_length"]
        self.vocab_size: int = index["vocab_size"]
        self.fingerprint: str = fingerprint([self.seq_length, index["dtype"], index["splits"][split]["sha256"]])
        self._rows: int = index["splits"][split]["rows"]
        self._local = local
        self._maps: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, folder: str, split: Split, *, verify: bool = False) -> Rows:
        """Open one split ("train" or "heldout"); a remote folder is first copied to this machine and checked.

        folder: written by `pack`, at any fsspec path. Every shard's size is checked; with `verify` its SHA-256 too, which
        reads the whole folder. Raises StorageError naming a shard that is missing, truncated or altered, and InputError
        for a folder or split that does not exist.
        """
        check_type("folder", folder, str, "the path of a folder")
        try:
            local = str(fetch(folder))
        except MissingFileError:
            local = ""
        if not local or not is_committed(local):
            raise InputError(f"{folder}: contains no packed rows", "pack a corpus into it first")
        storage.verify(local, hashes=verify)
        index = read_json(join(local, INDEX))
        if index.get("format") != FORMAT:
            raise InputError(f"{folder}: rows of format {index.get('format')!r}, not {FORMAT}", "pack the corpus again")
        if split not in index["splits"]:
            raise InputError(f"split: {split!r} does not exist", f"use one of {', '.join(index['splits'])}")
        if not index["splits"][split]["rows"]:
            raise InputError(f"{folder}: packed without {split} rows", f"pack the corpus again with some {split} rows")
        return cls(folder, local, split, index)

    def __len__(self) -> int:
        return self._rows

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling a memory map copies its whole content.
        return Rows.open, (self.folder, self.split)

    @property
    def sources(self) -> tuple[SourceCounts, ...]:
        """Tokens and documents of every source, of the held-out text's own source last; empty for rows of an earlier version,
        which has not counted them all."""
        packed = self.index.get("sources", [])
        return tuple(SourceCounts(**counts) for counts in packed) if all("documents" in one for one in packed) else ()

    @property
    def boundaries(self) -> DocumentBoundaries:
        """How to tell where documents begin in these rows. Raises InputError for chats whose messages end with the end-of-text
        token, as documents do: an answer would not see its question."""
        if self.index.get("ends_inside"):
            raise InputError(
                f"{self.folder}: documents cannot be told apart, because the tokenizer's chat template ends messages with the "
                "end-of-text token, too",
                "let the documents of a row attend to each other",
            )
        packed = self.index["request"]
        return DocumentBoundaries(packed["eos"], tuple(packed.get("begin", ())))

    def take(self, indices: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """The rows with these numbers, in this order: int64 [len(indices), seq_length] on the CPU.

        Raises IndexError for a number outside [0, len(rows)).
        """
        values = indices.cpu() if isinstance(indices, torch.Tensor) else indices
        numbers = np.asarray(values, dtype=np.int64).reshape(-1)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(self)):
            bad = numbers[(numbers < 0) | (numbers >= len(self))][0]
            raise IndexError(f"row {bad} of {self.folder} ({self.split}), which has rows 0 to {len(self) - 1}")
        rows = np.empty((numbers.size, self.seq_length), dtype=np.int64)
        shards, offsets = np.divmod(numbers, self.index["shard_rows"])
        for shard in np.unique(shards):
            mask = shards == shard
            rows[mask] = self._shard(int(shard))[offsets[mask]]
        return torch.from_numpy(rows)

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._maps:
            path = join(self._local, shard_name(self.split, number))
            try:
                flat = np.memmap(path, dtype=self.index["dtype"], mode="r")
            except OSError as error:
                raise StorageError(f"{path}: cannot be read ({error.strerror})", "pack the corpus again") from error
            self._maps[number] = flat.reshape(-1, self.seq_length)
        return self._maps[number]


def rows_for_step(num_rows: int, batch_rows: int, step: int, seed: int) -> list[int]:
    """The numbers of the `batch_rows` rows of global step `step`, counted from 0.

    Epoch e is the permutation of range(num_rows) given by (seed, e). Epochs follow each other without a gap: a batch may
    extend into the next epoch, so every batch is complete and no row is dropped or repeated within an epoch. The result is
    the same in every process, on every machine and with every numpy version: `RandomState`'s stream is frozen (NEP 19).
    Raises InputError for numbers out of range.
    """
    numbers_given = {"num_rows": num_rows, "batch_rows": batch_rows, "step": step, "seed": seed}
    for name, value in numbers_given.items():
        check_type(name, value, Integral)
    if num_rows < 1 or batch_rows < 1 or step < 0 or seed < 0:
        raise InputError(
            f"num_rows {num_rows}, batch_rows {batch_rows}, step {step}, seed {seed}",
            "rows and batch must be at least 1, step and seed at least 0",
        )
    numbers: list[int] = []
    while len(numbers) < batch_rows:
        epoch, offset = divmod(step * batch_rows + len(numbers), num_rows)
        numbers += _permutation(num_rows, seed, epoch)[offset : offset + batch_rows - len(numbers)].tolist()
    return numbers


def rows_of_steps(num_rows: int, batch_rows: int, steps: int, seed: int) -> list[int]:
    """The numbers of all rows used in the first `steps` steps, each once, ascending. Raises InputError as `rows_for_step`."""
    check_type("steps", steps, Integral)
    return sorted({row for step in range(steps) for row in rows_for_step(num_rows, batch_rows, step, seed)})


@lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    bits = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    order = np.random.RandomState(bits).permutation(num_rows)
    order.setflags(write=False)
    return order
