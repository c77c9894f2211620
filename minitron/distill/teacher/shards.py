"""What a teacher says about rows, on disk: shards of a fixed number of rows, each committed whole with its checksums.

A row's number gives its shard and its place there, so any process reads any row, in any order and at any batch size. Some
rows may be all that is stored; they keep their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minitron import storage
from minitron.data import Rows
from minitron.errors import NotWritableError, StorageError

ROWS_PER_SHARD = 64
FILE = "rows.safetensors"
INDEX = "index.json"

Compute = Callable[[Tensor], dict[str, Tensor]]


class Writing(TypedDict, total=False):
    """How rows are stored."""

    numbers: Sequence[int] | None
    """Of these rows alone, ascending; all by default."""
    batch_rows: int
    """Rows that the model is run on together, 4 by default."""
    rank: int
    world: int
    """So many processes write together, each with its `rank`; the last one completes the folder. 0 of 1 by default."""
    progress: Callable[[int, int], None] | None
    """Is told how many of how many rows are stored."""


def write_shards(
    load: Callable[[], tuple[nn.Module, Compute]],
    rows: Rows,
    folder: str,
    *,
    key: str,
    note: Callable[[dict[str, Tensor]], dict[str, Any]] = lambda tensors: {},
    **how: Unpack[Writing],
) -> int:
    """Write what `compute` makes of every row that is not stored yet; returns how many rows it was run on here.

    `load` is called only if something is missing, and gives the model and `compute`: int64 [n, seq_length] to named
    tensors [n, ...]. `note` of a shard's tensors goes into its manifest. Of several processes each writes every
    `world`-th shard; whoever sees that all are there writes the index, which makes the folder complete.
    Raises StorageError for a folder that holds something else, and before the first shard if the disk is too small.
    """
    numbers, batch_rows = how.get("numbers"), how.get("batch_rows", 4)
    rank, world, progress = how.get("rank", 0), how.get("world", 1), how.get("progress")
    wanted = range(len(rows)) if numbers is None else list(numbers)
    key = _whole_key(key, numbers)
    if storage.exists(storage.join(folder, INDEX)):
        _check_key(folder, _read_index(folder)["key"], key)
        return 0
    shards = range(-(-len(wanted) // ROWS_PER_SHARD))
    missing = [number for number in shards if not _is_there(folder, number, key)]
    mine = [number for number in missing if number % world == rank]
    if mine:
        model, compute = load()
        device = next(model.parameters()).device
    total = sum(len(_part(wanted, number)) for number in shards[rank::world])
    done = total - sum(len(_part(wanted, number)) for number in mine)
    computed = 0
    for number in mine:
        part, parts = _part(wanted, number), []
        for start in range(0, len(part), batch_rows):
            batch = rows.take(part[start : start + batch_rows])
            with torch.inference_mode():
                parts.append({name: tensor.cpu() for name, tensor in compute(batch.to(device)).items()})
            if not computed:
                _check_room(folder, parts[0], sum(len(_part(wanted, number)) for number in missing))
            computed += len(batch)
            if progress:
                progress(done + computed, total)
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        with storage.committed_folder(_shard_folder(folder, number), note={"key": key, **note(tensors)}) as place:
            save_file(tensors, str(place / FILE))
    if all(storage.is_committed(_shard_folder(folder, number)) for number in shards):
        index: dict[str, Any] = {"key": key, "num_rows": len(wanted), "rows_per_shard": ROWS_PER_SHARD}
        if numbers is not None:
            index["numbers"] = list(wanted)
        storage.write_json(storage.join(folder, INDEX), index)
    return computed


def _part(wanted: Sequence[int], shard: int) -> Sequence[int]:
    """The numbers of a shard's rows."""
    return wanted[shard * ROWS_PER_SHARD : (shard + 1) * ROWS_PER_SHARD]


def _whole_key(key: str, numbers: Sequence[int] | None) -> str:
    """The key with which rows are stored, so that shards of other rows are never mixed in."""
    return key if numbers is None else f"{key}-{storage.fingerprint(list(numbers))}"


def _shard_folder(folder: str, number: int) -> str:
    return storage.join(folder, f"shard-{number:05d}")


def _is_there(folder: str, number: int, key: str) -> bool:
    place = _shard_folder(folder, number)
    if not storage.is_committed(place):
        return False
    _check_key(place, storage.manifest(place)["note"].get("key"), key)
    return True


def _check_key(place: str, found: str | None, key: str) -> None:
    if found != key:
        raise StorageError(f"{place}: holds the store {found}, not {key}", f"delete {place} and run again")


def _check_room(folder: str, batch: dict[str, Tensor], missing: int) -> None:
    """Refuse before anything is written what the disk cannot hold."""
    if not storage.is_local(folder):
        return
    row = sum(tensor[0].nbytes for tensor in batch.values())
    free = storage.free_bytes(folder)
    if row * missing > free:
        raise NotWritableError(
            f"{folder}: storing {missing:,} rows needs {row * missing:,} bytes, and the disk has {free:,} free",
            f"{free // row:,} rows fit: free some space, store fewer rows, run the teacher during the distillation instead "
            "of storing its targets, or choose another folder",
        )


def _read_index(folder: str) -> dict[str, Any]:
    index: dict[str, Any] = storage.read_json(storage.join(folder, INDEX))
    return index


class Shards:
    """A complete folder that `write_shards` wrote, memory-mapped; every shard is verified when it is first read.

    Remote shards are copied to this machine once. Raises StorageError for a folder that is not complete, was made from
    another teacher or other rows, or has a missing or altered shard.
    """

    def __init__(self, folder: str, key: str) -> None:
        if not storage.exists(storage.join(folder, INDEX)):
            raise StorageError(f"{folder}: not completely written", "run what writes it again; it goes on where it was")
        index = _read_index(folder)
        numbers = index.get("numbers")
        self.folder, self.key = folder, _whole_key(key, numbers)
        _check_key(folder, index["key"], self.key)
        self.num_rows: int = index["num_rows"]
        self._positions = None if numbers is None else {number: position for position, number in enumerate(numbers)}
        self._rows_per_shard: int = index["rows_per_shard"]
        self._opened: dict[int, Future[dict[str, Tensor]]] = {}
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shards")

    def take(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of the rows with these numbers, [len(indices), ...]. Raises IndexError for a row that is not there."""
        places = [divmod(self._position(i), self._rows_per_shard) for i in indices]
        shards = self._open(indices)
        found = [shards[number].result() for number, _ in places]
        return {
            name: torch.stack([shard[name][row] for shard, (_, row) in zip(found, places, strict=True)])
            for name in found[0]
        }

    def prefetch(self, indices: Sequence[int]) -> None:
        """Copy, verify and map the shards of rows that are wanted soon, behind the caller's back."""
        self._open(indices)

    def notes(self) -> Iterator[dict[str, Any]]:
        """What was noted of each shard when it was written."""
        for number in range(-(-self.num_rows // self._rows_per_shard)):
            yield storage.manifest(_shard_folder(self.folder, number))["note"]

    def _open(self, indices: Iterable[int]) -> dict[int, Future[dict[str, Tensor]]]:
        for i in indices:
            number = self._position(i) // self._rows_per_shard
            if number not in self._opened:
                self._opened[number] = self._reader.submit(self._read, number)
        return self._opened

    def _position(self, row: int) -> int:
        """Where a row is among those that are stored."""
        if self._positions is None:
            if not 0 <= row < self.num_rows:
                raise IndexError(f"row {row} of {self.folder}, which has rows 0 to {self.num_rows - 1}")
            return row
        if row not in self._positions:
            raise IndexError(f"row {row} of {self.folder}, which has {self.num_rows} rows, this one not among them")
        return self._positions[row]

    def _read(self, number: int) -> dict[str, Tensor]:
        place = _shard_folder(self.folder, number)
        local = storage.fetch(place)
        storage.verify(str(local))
        _check_key(place, storage.manifest(place)["note"].get("key"), self.key)
        return load_file(str(Path(local) / FILE))
