"""Training checkpoints: a step is committed whole or does not exist, and a damaged one is passed over by name.

Every process writes its part through torch.distributed.checkpoint, as safetensors that say where in the whole tensor they
belong, so that any other number of processes can read them. Writing happens in the background on a copy in main memory.
"""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from minitron import storage
from minitron.errors import MinitronError, StorageError

log = logging.getLogger(__name__)
FILE_BYTES = 256 << 20  # safetensors copies what it writes, so one file's worth is the memory that saving takes
_STEP = re.compile(r"step-(\d{8})")
T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one training in `folder`, written and read by all its processes together.

    `key` names what is trained; a checkpoint of something else is never resumed from. The newest `keep` are kept. Used as a
    context, leaving it waits until the last one is committed. Where several processes write to a local path, all must see
    it. `before_commit` is called in process 0 before anything there is changed, and may raise a MinitronError that forbids
    it. Failures to write are raised as StorageError by the next call, in every process.
    """

    def __init__(
        self, folder: str, *, key: str, keep: int = 2, before_commit: Callable[[], None] | None = None
    ) -> None:
        self.folder, self.key, self.keep = folder, key, keep
        self.before_commit = before_commit or (lambda: None)
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        # of its own, because training goes on meanwhile
        self.group = dist.new_group(backend="gloo") if several else None
        self.copies: dict[str, Tensor] = {}
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        self.filters = ExitStack()

    def __enter__(self) -> Checkpoints:
        # Here, not around each save: filters are the process's, and saves are in a thread beside others.
        self.filters.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs no more
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.shutdown(wait=True)
        self.filters.close()
        self.copies.clear()
        if kind is None:
            self.wait()
            if self.group is not None:
                dist.destroy_process_group(self.group)
        elif self.pending is not None and (late := self.pending.exception()):
            log.warning("checkpoint not written: %s", late)

    def wait(self) -> None:
        """Until everything saved so far is committed."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def save(self, step: int, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
        """Commit `tensors` as the state after `step` steps, in the background, in place of what is there.

        DTensors are written in parts, each by who holds it; other tensors, the same in every process, are shared out.
        Returns when they are copied. The first of two saves is waited for.
        """
        self.wait()
        files = _files(tensors)
        mine = {
            name: tensor
            for number, (name, tensor) in enumerate(tensors.items())
            if isinstance(tensor, DTensor) or number % self.world == self.rank
        }
        copy = _copy(mine, self.copies)
        self.pending = self.writer.submit(self._write, step, copy, files, {**note, "step": step, "key": self.key})

    def load(self, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """Read the newest checkpoint that verifies into `tensors`; its note and "step", or None where there is none.

        Damaged ones are named in a warning and skipped. How many processes wrote it, and whether in parts, does not matter.
        """
        found = self._all(lambda: self._newest() if self.rank == 0 else None)[0]
        if found is None:
            return None
        path = _path(self.folder, found["step"])
        reader = HuggingFaceStorageReader(str(storage.fetch(path)))
        try:
            dcp.load(dict(tensors), storage_reader=reader, process_group=self.group, no_dist=self.group is None)
        except CheckpointException as error:
            raise StorageError(f"{path}: {_first(error)}", f"delete {path} and run again") from error
        return found

    def _newest(self) -> dict[str, Any] | None:
        for step in reversed(committed_steps(self.folder)):
            path = _path(self.folder, step)
            try:
                note: dict[str, Any] = storage.manifest(path)["note"]
                if (note.get("key"), note.get("step")) != (self.key, step):
                    raise StorageError(f"{path}: belongs to another training run", "delete it, or use another folder")
                storage.verify(path)
                return note
            except StorageError as error:
                log.warning("checkpoint skipped: %s", error.problem)
        return None

    def _write(self, step: int, tensors: dict[str, Tensor], files: dict[str, int], note: dict[str, Any]) -> None:
        path = _path(self.folder, step)
        with storage.disk_errors(path):
            place = self._place(path)
            try:
                writer = HuggingFaceStorageWriter(str(place), fqn_to_index_mapping=files, save_distributed=True)
                try:
                    dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
                except CheckpointException as error:
                    raise _first(error) from error
                written = self._all(lambda: storage.upload(place, path, f"shard-{self.rank + 1:05d}-*"))
                everything = {name: entry for part in written for name, entry in part.items()}
                self._all(lambda: self._commit(place, path, everything, note))
            finally:
                if self.rank == 0 or not storage.is_local(path):
                    shutil.rmtree(place, ignore_errors=True)

    def _place(self, path: str) -> Path:
        """A folder to write to: one for all processes below a local path, else one for each."""
        local = storage.is_local(path)

        def make() -> Path | None:
            if self.rank == 0:
                self.before_commit()
                storage.remove(path)  # a damaged one that was passed over
            return storage.staging_folder(path) if self.rank == 0 or not local else None

        def seen() -> None:
            if place is None or not place.is_dir():
                raise StorageError(
                    f"{path}: process {self.rank} does not see the folder that process 0 made there",
                    "use storage that all nodes share, for example s3://",
                )

        place = self._all(make)[0 if local else self.rank]
        self._all(seen)
        assert place is not None
        return place

    def _commit(self, place: Path, path: str, files: dict[str, Any], note: dict[str, Any]) -> None:
        if self.rank == 0:
            self.before_commit()
            storage.publish(place, path, files, note)
            for old in committed_steps(self.folder)[: -self.keep]:
                storage.remove(_path(self.folder, old))

    def _all(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives in every process; a failure anywhere is raised everywhere."""
        value, failure = None, None
        try:
            value = work()
        except (OSError, MinitronError) as error:
            failure = error
        results: list[Any] = [(value, failure)]
        if self.group is not None:
            results = [None] * self.world
            dist.all_gather_object(results, (value, failure), group=self.group)
        for _, failure in results:
            if failure is not None:
                raise failure
        return [value for value, _ in results]


@torch.no_grad()
def _copy(tensors: dict[str, Tensor], earlier: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` in main memory: in the tensors of `earlier` where they fit, else in new ones that are added to it.

    They are used again since reserving memory, and locking its pages for a GPU, takes longer than the copying. (The stagers
    of torch.distributed.checkpoint let go of them after each copy in torch 2.11 and keep them in 2.13.)
    """
    for name, tensor in tensors.items():
        if name not in earlier or earlier[name].shape != tensor.shape:
            earlier[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        _local(earlier[name]).copy_(_local(tensor), non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {name: earlier[name] for name in tensors}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of the file, from 1, that each tensor is written to."""
    numbers: dict[str, int] = {}
    number, size = 1, 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if numbers and size > FILE_BYTES:
            number, size = number + 1, tensor.nbytes
        numbers[name] = number
    return numbers


def _first(error: CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0]


def committed_steps(folder: str) -> list[int]:
    """Steps with a committed checkpoint, ascending."""
    steps = sorted(int(match[1]) for name in storage.names(folder) if (match := _STEP.fullmatch(name)))
    return [step for step in steps if storage.is_committed(_path(folder, step))]


def _path(folder: str, step: int) -> str:
    return storage.join(folder, f"step-{step:08d}")
