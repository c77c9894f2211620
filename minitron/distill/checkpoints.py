"""Training checkpoints: a step is committed whole or does not exist, and a damaged one is skipped by name.

Every process writes its part of the state to one file, which any other number of processes can read (see
`checkpoint_files`). Writing happens in the background on a copy in main memory.
"""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor

from minitron import storage
from minitron.collectives import gather_results
from minitron.device import on_this_gpu
from minitron.distill.checkpoint_files import LAYOUT, PiecesReader, PiecesWriter, file_name
from minitron.errors import StorageError
from minitron.sharded_tensors import own_part

log = logging.getLogger(__name__)
_MANIFEST = re.compile(rf"step-(\d{{8}})/{re.escape(storage.MANIFEST)}")
T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one training in `folder`, written and read by all its processes together.

    `key` names what is trained; a checkpoint of something else is never resumed from. The newest `keep` are kept. Used as a
    context, leaving it waits until the last one is committed. Where several processes write to a local path, all must see
    it. `before_commit` is called in process 0 before anything there is changed, and may raise a MinitronError that forbids
    it. `saved` is called in process 0, in another thread, with the step of each that was committed. Failures to write are
    raised as StorageError by the next call, in every process.
    """

    def __init__(
        self,
        folder: str,
        *,
        key: str,
        keep: int = 2,
        before_commit: Callable[[], None] | None = None,
        saved: Callable[[int], None] | None = None,
    ) -> None:
        self.folder, self.key, self.keep = folder, key, keep
        self.before_commit = before_commit or (lambda: None)
        self.saved = saved or (lambda step: None)
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        # of its own, because training continues meanwhile
        self.group = dist.new_group(backend="gloo") if several else None
        self.copies: dict[str, Tensor] = {}
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=on_this_gpu())
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
        """Commit `tensors` as the state after `step` steps, in the background, replacing an earlier checkpoint of that step.

        DTensors are written in parts, each by who holds it; other tensors, the same in every process, are shared out.
        Returns when they are copied. The first of two saves is waited for.
        """
        self.wait()
        mine = {
            name: tensor
            for number, (name, tensor) in enumerate(tensors.items())
            if isinstance(tensor, DTensor) or number % self.world == self.rank
        }
        copy = _copy(mine, self.copies)
        self.pending = self.writer.submit(self._write, step, copy, {**note, "step": step, "key": self.key})

    def load(self, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """Read the newest undamaged checkpoint into `tensors`; its note and "step", or None where there is none.

        Each process checks and reads the part that it needs. Damaged checkpoints are named in a warning and skipped, and
        have changed nothing. How many processes wrote it, and whether in parts, does not matter.
        """
        before = None
        while True:
            note: dict[str, Any] | None = self._all(partial(self._newest, before))[0]
            if note is None:
                return None
            before = note["step"]
            path = _path(self.folder, before)
            damage = self._read(path, tensors)
            if damage is None:
                return note
            if self.rank == 0:
                log.warning("checkpoint skipped: %s", damage.problem)

    def _newest(self, before: int | None) -> dict[str, Any] | None:
        """In process 0, the note of the newest checkpoint earlier than step `before` whose files have their sizes."""
        for step in reversed(committed_steps(self.folder) if self.rank == 0 else []):
            if before is not None and step >= before:
                continue
            path = _path(self.folder, step)
            try:
                note: dict[str, Any] = storage.manifest(path)["note"]
                if (note.get("key"), note.get("step")) != (self.key, step):
                    raise StorageError(f"{path}: belongs to another training run", "delete it, or use another folder")
                storage.verify(path, hashes=False)
                return note
            except StorageError as error:
                log.warning("checkpoint skipped: %s", error.problem)
        return None

    def _read(self, path: str, tensors: dict[str, Tensor]) -> StorageError | None:
        """Read a checkpoint, or return what is damaged of it, the same in every process and before anything is changed.

        Raises StorageError for one that is not of these tensors, or could not be read to its end.
        """
        readers: list[StorageReader] = []
        try:
            self._all(lambda: readers.append(self._reader(path)))
        except StorageError as damage:
            return damage
        [reader] = readers
        try:
            dcp.load(dict(tensors), storage_reader=reader, process_group=self.group, no_dist=self.group is None)
        except CheckpointException as error:
            first = _first(error)
            if isinstance(first, StorageError) and isinstance(reader, PiecesReader) and not reader.checked:
                return first
            raise StorageError(f"{path}: {first}", f"delete {path} and run again") from error
        return None

    def _reader(self, path: str) -> StorageReader:
        files = storage.manifest(path)["files"]
        if LAYOUT in files:
            return PiecesReader(path, files, self._all)
        # an earlier version's, in many files, which is read whole
        storage.verify(path, only=sorted(files)[self.rank :: self.world])
        return HuggingFaceStorageReader(str(storage.fetch(path)))

    def _write(self, step: int, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
        path = _path(self.folder, step)
        with storage.disk_errors(path):
            staging = self._staging_folder(path)
            try:
                writer = PiecesWriter(staging, self.rank)
                try:
                    dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
                except CheckpointException as error:
                    raise _first(error) from error
                written = self._all(lambda: self._upload(staging, path, writer.entries))
                everything = {name: entry for part in written for name, entry in part.items()}
                self._all(lambda: self._commit(staging, path, everything, note))
                if self.rank == 0:
                    self.saved(step)
            finally:
                if self.rank == 0 or not storage.is_local(path):
                    shutil.rmtree(staging, ignore_errors=True)

    def _upload(self, staging: Path, path: str, entries: dict[str, Any]) -> dict[str, Any]:
        uploaded = storage.upload(staging, path, file_name(self.rank), known=entries)
        return uploaded | (storage.upload(staging, path, LAYOUT) if self.rank == 0 else {})

    def _staging_folder(self, path: str) -> Path:
        """A folder to write to: one for all processes below a local path, else one for each."""
        local = storage.is_local(path)

        def make() -> str | None:
            if self.rank == 0:
                self.before_commit()
                storage.remove(path)  # a damaged one that was passed over
            return str(storage.staging_folder(path)) if self.rank == 0 or not local else None

        def seen() -> None:
            if not folder or not Path(folder).is_dir():
                raise StorageError(
                    f"{path}: process {self.rank} does not see the folder that process 0 made there",
                    "use storage that all nodes share, for example s3://",
                )

        folder = self._all(make)[0 if local else self.rank]
        self._all(seen)
        assert folder is not None
        return Path(folder)

    def _commit(self, staging: Path, path: str, files: dict[str, Any], note: dict[str, Any]) -> None:
        if self.rank == 0:
            self.before_commit()
            storage.publish(staging, path, files, note)
            for old in committed_steps(self.folder)[: -self.keep]:
                storage.remove(_path(self.folder, old))

    def _all(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives in every process, JSON values; a failure anywhere is raised everywhere."""
        return [work()] if self.group is None else gather_results(work, self.group)


@torch.no_grad()
def _copy(tensors: dict[str, Tensor], earlier: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` in main memory: in the tensors of `earlier` where they fit, else in new ones that are added to it.

    They are used again since reserving memory, and locking its pages for a GPU, takes longer than the copying. (The stagers
    of torch.distributed.checkpoint let go of them after each copy in torch 2.11 and keep them in 2.13.)
    """
    for name, tensor in tensors.items():
        if name not in earlier or earlier[name].shape != tensor.shape:
            earlier[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        own_part(earlier[name]).copy_(own_part(tensor), non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {name: earlier[name] for name in tensors}


def _first(error: CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0]


def committed_steps(folder: str) -> list[int]:
    """Steps with a committed checkpoint, ascending."""
    names = storage.file_sizes(folder)  # one listing, where each manifest alone would be another request
    return sorted(int(match[1]) for name in names if (match := _MANIFEST.fullmatch(name)))


def _path(folder: str, step: int) -> str:
    return storage.join(folder, f"step-{step:08d}")
