"""Teacher targets: the final hidden states of rows, stored once and shared by everything that distils on them.

The exact logits are rebuilt from a hidden state with the teacher's own head, so nothing is lost, at 2·hidden bytes per
token instead of 2·vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minitron import storage
from minitron.data import Rows
from minitron.errors import StorageError
from minitron.logits import Head
from minitron.models import final_hidden

ROWS_PER_SHARD = 64
FILE = "hidden.safetensors"


class Targets(Protocol):
    """Where a distillation gets its teacher from."""

    head: Head

    def hidden(self, indices: Sequence[int], input_ids: Tensor) -> Tensor:
        """Teacher's final hidden states [n, seq_length, hidden] of the rows with these numbers and tokens."""
        ...


class LiveTeacher:
    """A teacher in memory, run on every batch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head = Head.of(self.model)

    @torch.no_grad()
    def hidden(self, indices: Sequence[int], input_ids: Tensor) -> Tensor:
        return final_hidden(self.model, input_ids)


class StoredTeacher:
    """Hidden states read back from a store that `store_hidden` completed; memory-mapped, bit-equal to what was written.

    Raises StorageError if the store was made from another teacher or other rows, or a shard is missing.
    """

    def __init__(self, folder: str, head: Head, key: str) -> None:
        index = storage.read_json(storage.join(folder, "index.json"))
        if index["key"] != key:
            raise StorageError(f"{folder}: holds the store {index['key']}, not {key}", f"delete {folder} and run again")
        self.head = head
        self.folder, self.num_rows, self.rows_per_shard = folder, index["num_rows"], index["rows_per_shard"]
        self._shards: dict[int, Tensor] = {}

    def hidden(self, indices: Sequence[int], input_ids: Tensor) -> Tensor:
        parts = [self._shard(i // self.rows_per_shard)[i % self.rows_per_shard] for i in indices]
        return torch.stack(parts).to(input_ids.device)

    def _shard(self, number: int) -> Tensor:
        if number not in self._shards:
            folder = _shard_folder(self.folder, number)
            storage.verify(folder, hashes=True)
            with safe_open(str(storage.fetch(folder) / FILE), "pt") as file:
                self._shards[number] = file.get_tensor("hidden")
        return self._shards[number]


def store_key(teacher_id: str, rows: str, dtype: str) -> str:
    """The name of the hidden states of one teacher's weights on one set of rows in one dtype."""
    return storage.fingerprint({"teacher": teacher_id, "rows": rows, "dtype": dtype})


def store_hidden(
    load_teacher: Callable[[], nn.Module],
    rows: Rows,
    folder: str,
    *,
    key: str,
    batch_rows: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the hidden states of every row in shards of 64 rows; returns how many rows the teacher was run on now.

    Shards that are already there are kept, so a killed run goes on where it was. `load_teacher` is called only if
    something is missing. The folder is complete when `index.json` is there.
    """
    index = storage.join(folder, "index.json")
    if storage.exists(index):
        return 0
    starts = range(0, len(rows), ROWS_PER_SHARD)
    missing = [s for s in starts if not storage.is_committed(_shard_folder(folder, s // ROWS_PER_SHARD))]
    done, computed = len(rows) - sum(min(ROWS_PER_SHARD, len(rows) - s) for s in missing), 0
    model = load_teacher() if missing else None
    for start in missing:
        assert model is not None
        parts = []
        for first in range(start, min(start + ROWS_PER_SHARD, len(rows)), batch_rows):
            batch = rows.take(range(first, min(first + batch_rows, start + ROWS_PER_SHARD, len(rows))))
            with torch.inference_mode():
                parts.append(final_hidden(model, batch.to(next(model.parameters()).device)).cpu())
            done, computed = done + len(batch), computed + len(batch)
            if progress:
                progress(done, len(rows))
        with storage.committed_folder(_shard_folder(folder, start // ROWS_PER_SHARD)) as place:
            save_file({"hidden": torch.cat(parts)}, str(Path(place) / FILE))
    storage.write_json(index, {"key": key, "num_rows": len(rows), "rows_per_shard": ROWS_PER_SHARD})
    return computed


def _shard_folder(folder: str, number: int) -> str:
    return storage.join(folder, f"shard-{number:05d}")
