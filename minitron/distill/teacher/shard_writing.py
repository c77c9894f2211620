"""Compute a teacher's outputs for rows and store them in shards; a shard is written while the next one is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn

from minitron import storage
from minitron.arguments import check_type
from minitron.data import Rows
from minitron.device import on_this_gpu
from minitron.distill.teacher.shard_format import (
    FILE,
    INDEX,
    ROWS_PER_SHARD,
    Index,
    check_key,
    committed_shards,
    key_of_rows,
    shard_folder,
    shard_name,
)
from minitron.errors import NotWritableError, StorageError
from minitron.processes import from_first, is_sharded, largest, own_rank, world_size
from minitron.storage.tensors import write_tensors

SHARD_BYTES = 256 << 20
SMALL_SHARD_BYTES = 4 << 20
"""Shards are not made smaller so that each process has one."""

Compute = Callable[[Tensor], dict[str, Tensor]]


class RowModel(NamedTuple):
    """A model in memory, and the function that computes what is stored: from tokens, int64 [n, seq_length], named tensors
    [n, ...] that take `row_bytes` bytes per row."""

    model: nn.Module
    compute: Compute
    row_bytes: int


class Writing(TypedDict, total=False):
    """Options of storing rows."""

    numbers: Sequence[int] | None
    """Numbers of the rows to store, ascending; by default all."""
    batch_rows: int
    """Rows per forward pass, 4 by default."""
    shard_bytes: int
    """Approximate size of a shard, at least one batch; by default 256 MiB, or less if there would be too few shards for `world`
    processes. An unfinished store keeps its size of shards."""
    rank: int
    world: int
    """`world` processes write together, each with its own `rank`; the last one completes the folder. By default rank 0 of 1.
    All processes of a torch.distributed group may share a sharded model, if all call alike."""
    before_commit: Callable[[], None]
    """Called before a shard or the index is written; it may raise a MinitronError to prevent that."""
    progress: Callable[[int, int], None] | None
    """Called with the number of computed rows and the number of all rows."""


def write_shards(
    load: Callable[[], RowModel],
    rows: Rows,
    folder: str,
    *,
    key: str,
    note: Callable[[dict[str, Tensor]], dict[str, Any]] = lambda tensors: {},
    **how: Unpack[Writing],
) -> int:
    """Compute and write the rows that are not stored yet; returns the number of rows that the model ran on in this call.

    `load` is called only if a shard is missing, in this process or in another one of a torch.distributed group. `note` of a
    shard's tensors is stored in its manifest. Of several processes, each writes every `world`-th shard; the process that finds
    all shards written writes the index, which makes the folder complete. On an object store this takes one listing, two files
    for each shard, and the index.
    Raises StorageError for a folder that holds something else, and before the first shard if the disk is too small.
    """
    if not hasattr(rows, "take"):  # a tensor, or the folder's path
        check_type("rows", rows, Rows, "Rows, as Rows.open(...) returns them")
    check_type("folder", folder, str, "the path of a folder")
    numbers = how.get("numbers")
    batch_rows = how.get("batch_rows", 4)
    rank, world, progress = how.get("rank", 0), how.get("world", 1), how.get("progress")
    before_commit = how.get("before_commit", lambda: None)
    chosen = range(len(rows)) if numbers is None else list(numbers)
    key = key_of_rows(key, numbers)
    in_group = world > 1 and world_size() == world
    files = _files(folder, in_group)
    if INDEX in files:
        check_key(folder, Index.read(folder).key, key)
        return 0
    committed = committed_shards(files)
    loaded = None
    if committed:  # of one store, because each writer looks at one of them before it adds more
        rows_per_shard = _rows_per_shard(shard_folder(folder, min(committed)), key)
    else:
        loaded = load()
        shard_bytes = how.get("shard_bytes") or default_shard_bytes(loaded.row_bytes * len(chosen), world)
        batches = round(shard_bytes / (loaded.row_bytes * batch_rows))
        rows_per_shard = max(1, batches) * batch_rows
    index = Index(key, len(chosen), rows_per_shard, None if numbers is None else list(chosen))
    everything = set(range(index.num_shards))
    mine = range(index.num_shards)[rank::world]
    missing = [number for number in mine if number not in committed]
    passes = sum(-(-index.rows_of_shard(number) // batch_rows) for number in missing)
    most = largest([passes], in_group)[0]
    total, computed = index.rows_of(mine), 0
    done = total - index.rows_of(missing)
    if most:
        loaded = loaded or load()
        device = next(loaded.model.parameters()).device
        with _Writer(folder, index, note, before_commit) as writer:
            for number in missing:
                part = chosen[number * rows_per_shard : (number + 1) * rows_per_shard]
                for start in range(0, len(part), batch_rows):
                    batch = rows.take(part[start : start + batch_rows])
                    with torch.inference_mode():
                        tensors = loaded.compute(batch.to(device))
                    if not computed:
                        _check_room(folder, tensors, index.rows_of(everything - committed))
                    writer.add(tensors)
                    computed += len(batch)
                    if progress:
                        progress(done + computed, total)
                writer.write(number)
        if is_sharded(loaded.model):
            for _ in range(passes, most):  # its layers are gathered by all processes together
                with torch.inference_mode():
                    loaded.compute(rows.take(chosen[:batch_rows]).to(device))
    committed = committed_shards(storage.file_sizes(folder)) if world > 1 else committed | set(missing)
    if everything <= committed:
        before_commit()
        index.write(folder)
    return computed


def _files(folder: str, in_group: bool) -> dict[str, int]:
    """Sizes of the files in a folder, by path. Those that the first process sees, in all: a worker of an earlier driver may
    still write there, and the processes must load the teacher together or not at all."""
    if not in_group:
        return storage.file_sizes(folder)
    own = storage.file_sizes(folder) if own_rank() == 0 else {}
    sizes: dict[str, int] = json.loads(from_first(json.dumps(own).encode(), together=True))
    return sizes


def default_shard_bytes(total: int, world: int) -> int:
    """Approximate size of the shards of a store of `total` bytes that `world` processes write."""
    return SHARD_BYTES if world == 1 else min(SHARD_BYTES, max(SMALL_SHARD_BYTES, total // world))


def _rows_per_shard(shard: str, key: str) -> int:
    """Number of rows per shard of a store, from the manifest of one of them."""
    note = storage.manifest(shard)["note"]
    check_key(shard, note.get("key"), key)
    rows: int = note.get("rows_per_shard", ROWS_PER_SHARD)
    if type(rows) is not int or rows < 1:
        raise StorageError(f"{shard}: says that shards have {rows!r} rows", f"delete {shard} and run again")
    return rows


class _Writer:
    """Collects the rows of a shard, and writes the previous shard in a thread.

    Two buffers in main memory take turns. From a GPU, rows are copied while it computes the next ones.
    """

    def __init__(
        self,
        folder: str,
        index: Index,
        note: Callable[[dict[str, Tensor]], dict[str, Any]],
        before_commit: Callable[[], None],
    ) -> None:
        self.folder, self.index, self.note, self.before_commit = folder, index, note, before_commit
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="shard", initializer=on_this_gpu())
        self.pending: Future[None] | None = None
        self.buffers: list[dict[str, Tensor]] = [{}, {}]
        self.filled = 0
        self.staging: Path | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.thread.shutdown(wait=True)
            if kind is None:
                self._wait()
        finally:
            if self.staging:
                shutil.rmtree(self.staging, ignore_errors=True)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Add a batch of rows to the shard."""
        buffer = self.buffers[0]
        for name, tensor in tensors.items():
            if name not in buffer:
                shape = (self.index.rows_of_shard(0), *tensor.shape[1:])
                buffer[name] = torch.empty(shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            buffer[name][self.filled : self.filled + len(tensor)].copy_(tensor, non_blocking=True)
        self.filled += len(next(iter(tensors.values())))

    def write(self, number: int) -> None:
        """Commit the shard in the thread, after the one before."""
        self._wait()
        copied = None
        if torch.cuda.is_available():
            copied = torch.cuda.Event()
            copied.record()
        tensors = {name: tensor[: self.filled] for name, tensor in self.buffers[0].items()}
        self.pending = self.thread.submit(self._commit, number, tensors, copied)
        self.buffers.reverse()
        self.filled = 0

    def _wait(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _commit(self, number: int, tensors: dict[str, Tensor], copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        target = shard_folder(self.folder, number)
        with storage.disk_errors(target):
            if self.staging is None:
                self.staging = storage.staging_folder(storage.join(self.folder, "shards"))
            staged = self.staging / shard_name(number)
            staged.mkdir()
            entry, _ = write_tensors(staged / FILE, tensors)
            self.before_commit()
            note = {"key": self.index.key, "rows_per_shard": self.index.rows_per_shard, **self.note(tensors)}
            storage.publish(staged, target, storage.upload(staged, target, known={FILE: entry}), note)
            shutil.rmtree(staged, ignore_errors=True)


def _check_room(folder: str, batch: dict[str, Tensor], missing: int) -> None:
    """Raise NotWritableError, before anything is written, if the disk has too little space for the missing rows."""
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
