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
from minitron.distill.teacher.shard_format import FILE, INDEX, Index, check_key, key_of_rows, shard_folder
from minitron.errors import StorageError
from minitron.storage.ranges import READERS, read_checked
from minitron.storage.tensors import Slot, read_slots

READ_AHEAD_BYTES = 256 << 20  # limit for rows in memory that `take` has not requested yet
OPEN_SHARDS = 4096  # number of shards whose manifests are kept in memory


class _Shard(NamedTuple):
    """A shard that can be read. entry: the entry of its file in the manifest."""

    path: str
    entry: dict[str, Any]
    slots: dict[str, Slot]


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
        if not storage.exists(storage.join(folder, INDEX)):
            raise StorageError(f"{folder}: not completely written", "run what writes it again; it resumes where it was")
        self.folder = folder
        self._index = Index.read(folder)
        self.key = key_of_rows(key, self._index.numbers)
        check_key(folder, self._index.key, self.key)
        self.num_rows = self._index.num_rows
        numbers = self._index.numbers
        self._positions = None if numbers is None else {number: position for position, number in enumerate(numbers)}
        self._opened = lru_cache(OPEN_SHARDS)(self._open)
        self._opening = Lock()
        self._limit = 0
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="shards")
        self._lock = Lock()
        self._waiting: deque[int] = deque()  # positions of rows to read, in order
        self._reading: dict[int, Future[dict[str, Tensor]]] = {}  # by position, until `take` returns them

    def take(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of the rows with these numbers, [len(indices), ...]. Raises IndexError for a row that is not stored."""
        positions = [self._position(index) for index in indices]
        with self._lock:
            for position in positions:
                if position not in self._reading:
                    self._reading[position] = self._readers.submit(self._read, position)
            futures = {position: self._reading.pop(position) for position in dict.fromkeys(positions)}
            self._waiting = deque(position for position in self._waiting if position not in futures)
        rows = {position: future.result() for position, future in futures.items()}
        self._read_ahead()
        return {name: torch.stack([rows[position][name] for position in positions]) for name in rows[positions[0]]}

    def prefetch(self, indices: Sequence[int]) -> None:
        """Begin to read the rows with these numbers, in this order; replaces the rows of an earlier call."""
        positions = list(dict.fromkeys(self._position(index) for index in indices))
        with self._lock:
            for position in self._reading.keys() - set(positions):
                self._reading.pop(position).cancel()
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
        if not self._limit:
            slots = self._shard(first // self._index.rows_per_shard).slots.values()
            self._limit = max(1, READ_AHEAD_BYTES // max(1, sum(slot.rows(0, 1).nbytes for slot in slots)))
        with self._lock:
            while self._waiting and len(self._reading) < self._limit:
                position = self._waiting.popleft()
                self._reading[position] = self._readers.submit(self._read, position)

    def _position(self, row: int) -> int:
        """Index of a row among the stored rows."""
        if self._positions is None:
            if not 0 <= row < self.num_rows:
                raise IndexError(f"row {row} of {self.folder}, which has rows 0 to {self.num_rows - 1}")
            return row
        if row not in self._positions:
            raise IndexError(f"row {row} of {self.folder}, which has {self.num_rows} rows, this one not among them")
        return self._positions[row]

    def _read(self, position: int) -> dict[str, Tensor]:
        number, row = divmod(position, self._index.rows_per_shard)
        shard = self._shard(number)
        slots = {name: slot.rows(row, row + 1) for name, slot in shard.slots.items()}
        data = read_checked(shard.path, shard.entry, [(slot.start, slot.end) for slot in slots.values()])
        return {name: slot.tensor(value)[0] for (name, slot), value in zip(slots.items(), data, strict=True)}

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
