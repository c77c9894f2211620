"""Reads rows from a store. Only the byte range of a row is read, and it is verified when it is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitron import storage
from minitron.arguments import check_type
from minitron.distill.teacher.shard_format import FILE, Index, check_key, key_of_rows, shard_folder
from minitron.errors import StorageError
from minitron.storage.ranges import READERS, read_checked
from minitron.storage.tensors import Slot, read_slots

READ_AHEAD_BYTES = 256 << 20  # limit for rows in memory that `take` has not requested yet
BLOCK_BYTES = 8 << 20  # limit for consecutive rows that are read by one request
OPEN_SHARDS = 4096  # number of shards whose manifests are kept in memory


class _Shard(NamedTuple):
    """A shard that can be read. entry: the entry of its file in the manifest."""

    path: str
    entry: dict[str, Any]
    slots: dict[str, Slot]


class _Block(NamedTuple):
    """A row of consecutive rows that are read together, and its place among them."""

    rows: Future[list[dict[str, Tensor]]]
    offset: int


class Shards:
    """A complete folder that `write_shards` wrote.

    Rows are read in threads, from object stores by range requests, and verified by the SHA-256 of each row in the shard's
    manifest. Shards of earlier versions, which have no SHA-256 per row, are verified whole when they are first used; remote
    ones are copied to this machine once. Raises StorageError for a folder that is not complete, was made from another teacher
    or other rows, or has a missing or altered row.
    """

    def __init__(self, folder: str, key: str) -> None:
        check_type("folder", folder, str, "the path of a folder")
        check_type("key", key, str)
        self.folder = folder
        self._index = Index.read(folder)
        self.key = key_of_rows(key, self._index.numbers)
        check_key(folder, self._index.key, self.key)
        self.num_rows = self._index.num_rows
        numbers = self._index.numbers
        self._positions = None if numbers is None else {number: position for position, number in enumerate(numbers)}
        self._opened = lru_cache(OPEN_SHARDS)(self._open)
        self._opening = Lock()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="shards")
        self._lock = Lock()
        self._waiting: deque[int] = deque()  # positions of rows to read, in order
        self._row_bytes = 0
        self._reading: dict[int, _Block] = {}  # by position, until `take` returns them

    def take(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of the rows with these numbers, [len(indices), ...]. Raises IndexError for a row that is not stored."""
        positions = [self._position(index) for index in indices]
        self._measure_row(positions[0])
        with self._lock:
            missing = deque(position for position in dict.fromkeys(positions) if position not in self._reading)
            while missing:
                self._read_block(missing, len(missing))
            blocks = {position: self._reading.pop(position) for position in dict.fromkeys(positions)}
            self._waiting = deque(position for position in self._waiting if position not in blocks)
        rows = {position: block.rows.result()[block.offset] for position, block in blocks.items()}
        self._read_ahead()
        return {name: _stacked([rows[position][name] for position in positions]) for name in rows[positions[0]]}

    def prefetch(self, indices: Sequence[int]) -> None:
        """Begin to read the rows with these numbers, in this order; replaces the rows of an earlier call."""
        positions = list(dict.fromkeys(self._position(index) for index in indices))
        with self._lock:
            unwanted = [self._reading.pop(position) for position in self._reading.keys() - set(positions)]
            wanted = {block.rows for block in self._reading.values()}
            for block in unwanted:
                if block.rows not in wanted:
                    block.rows.cancel()
            self._waiting = deque(position for position in positions if position not in self._reading)
        self._read_ahead()

    def notes(self) -> Iterator[dict[str, Any]]:
        """The `note` of each shard, from its manifest."""
        folders = [shard_folder(self.folder, number) for number in range(self._index.num_shards)]
        for manifest in self._readers.map(storage.manifest, folders):
            yield manifest["note"]

    def _read_ahead(self) -> None:
        """Start reading as many rows as READ_AHEAD_BYTES allow."""
        with self._lock:
            first = self._waiting[0] if self._waiting else None
        if first is None:
            return
        self._measure_row(first)
        limit = READ_AHEAD_BYTES // self._row_bytes
        with self._lock:
            while self._waiting and len(self._reading) < max(1, limit):
                self._read_block(self._waiting, limit - len(self._reading))

    def _read_block(self, waiting: deque[int], limit: int) -> None:
        """Start reading the first of the `waiting` rows and those that follow it in its shard, at most `limit`; takes them out
        of `waiting`."""
        first = waiting.popleft()
        rest = self._index.rows_per_shard - first % self._index.rows_per_shard  # of its shard
        limit = min(limit, rest, BLOCK_BYTES // self._row_bytes)
        count = 1
        while count < limit and waiting and waiting[0] == first + count:
            waiting.popleft()
            count += 1
        rows = self._readers.submit(self._read, first, count)
        self._reading |= {first + offset: _Block(rows, offset) for offset in range(count)}

    def _measure_row(self, position: int) -> None:
        """Set `_row_bytes`, from the shard of this row."""
        if not self._row_bytes:
            slots = self._shard(position // self._index.rows_per_shard).slots.values()
            self._row_bytes = max(1, sum(slot.rows(0, 1).nbytes for slot in slots))

    def _position(self, row: int) -> int:
        """Index of a row among the stored rows."""
        if self._positions is None:
            if not 0 <= row < self.num_rows:
                raise IndexError(f"row {row} of {self.folder}, which has rows 0 to {self.num_rows - 1}")
            return row
        if row not in self._positions:
            raise IndexError(f"row {row} of {self.folder}, which has {self.num_rows} rows, this one not among them")
        return self._positions[row]

    def _read(self, first: int, count: int) -> list[dict[str, Tensor]]:
        """`count` consecutive rows of a shard."""
        number, row = divmod(first, self._index.rows_per_shard)
        shard = self._shard(number)
        slots = {name: slot.rows(row, row + count) for name, slot in shard.slots.items()}
        data = read_checked(shard.path, shard.entry, [(slot.start, slot.end) for slot in slots.values()], _buffer)
        tensors = {name: slot.tensor(value) for (name, slot), value in zip(slots.items(), data, strict=True)}
        return [{name: tensor[offset] for name, tensor in tensors.items()} for offset in range(count)]

    def _shard(self, number: int) -> _Shard:
        with self._opening:  # one thread opens a shard, the others wait for it
            return self._opened(number)

    def _open(self, number: int) -> _Shard:
        folder = shard_folder(self.folder, number)
        manifest = storage.manifest(folder)
        check_key(folder, manifest["note"].get("key"), self.key)
        entry = manifest["files"].get(FILE)
        if entry is None:
            raise StorageError(f"{folder}: has no {FILE}", f"delete {folder} and run again")
        if not entry.get("parts"):
            folder = str(storage.fetch(folder))
            storage.verify(folder)
        path = storage.join(folder, FILE)
        slots = read_slots(path, entry)
        rows = self._index.rows_of_shard(number)
        if not slots or any(slot.shape[:1] != (rows,) for slot in slots.values()):
            shapes = {name: list(slot.shape) for name, slot in slots.items()}
            raise StorageError(f"{path}: has {shapes} where {rows} rows are expected", f"delete {folder} and run again")
        return _Shard(path, entry, slots)


def _buffer(size: int) -> bytearray | memoryview:
    """Memory to read into. In a process that uses a GPU it is pinned: PyTorch keeps such memory and gives it out again, while
    new pages take longer to get than to read from a disk's cache."""
    if not torch.cuda.is_initialized():
        return bytearray(size)
    return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().data


def _stacked(rows: list[Tensor]) -> Tensor:
    """[len(rows), ...], pinned as `_buffer` is."""
    shape = (len(rows), *rows[0].shape)
    return torch.stack(rows, out=torch.empty(shape, dtype=rows[0].dtype, pin_memory=torch.cuda.is_initialized()))
