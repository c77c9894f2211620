"""The files of a checkpoint: one for each process that writes, and a layout that says where every part of a tensor is.

torch.distributed.checkpoint plans who writes and who reads which part; this module puts the parts into files and reads them. A
process that resumes reads, and checks, only the byte ranges that its own parts are in.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, SavePlan, SavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from minitron import storage
from minitron.errors import StorageError
from minitron.storage.ranges import check_part, parts_of, read_ahead, read_ranges
from minitron.storage.tensors import DTYPES, NAMES, Slot, write_tensors

LAYOUT = "layout.json"
PART_BYTES = 8 << 20  # with a checksum of their own


@dataclass(frozen=True)
class Piece:
    """A box of a tensor in a file: of what is `size` in all, `slot.shape` from `offsets`."""

    name: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    file: str
    slot: Slot

    def box(self, offsets: torch.Size, lengths: torch.Size) -> Slot:
        """The rows of dimension 0 that a box inside this piece lies in."""
        return self.slot.rows(offsets[0], offsets[0] + lengths[0]) if offsets else self.slot


def file_name(rank: int) -> str:
    """The file of a process."""
    return f"shard-{rank + 1:05d}.safetensors"


class PiecesWriter(StorageWriter):
    """Writes what this process has of a state to one file in `folder`, without a copy; process 0 writes the layout.

    entries: of the file it wrote, for the manifest.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.entries: dict[str, dict[str, Any]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        file = file_name(self.rank)
        tensors: dict[str, Tensor] = {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            # of a tensor that has several pieces here, the others get a number
            name = item.index.fqn if item.index.fqn not in tensors else f"{item.index.fqn} {len(tensors)}"
            tensors[name] = tensor.detach()
        results = []
        if tensors:
            self.entries[file], slots = write_tensors(self.folder / file, tensors, PART_BYTES)
        for item, name in zip(plan.items, tensors, strict=True):
            data = item.tensor_data
            assert data is not None
            piece = Piece(item.index.fqn, tuple(data.size), tuple(data.chunk.offsets), file, slots[name])
            results.append(WriteResult(item.index, slots[name].nbytes, piece))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        tensors: dict[str, dict[str, Any]] = {}
        for piece in (result.storage_data for part in results for result in part if result.size_in_bytes):
            described = {"dtype": NAMES[piece.slot.dtype], "size": piece.size, "pieces": []}
            tensors.setdefault(piece.name, described)["pieces"].append(
                {"offsets": piece.offsets, "shape": piece.slot.shape, "file": piece.file, "start": piece.slot.start}
            )
        (self.folder / LAYOUT).write_text(json.dumps({"tensors": tensors}, separators=(",", ":"), sort_keys=True))

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class PiecesReader(StorageReader):
    """Reads a checkpoint that PiecesWriter wrote. files: its manifest's entries.

    `agree` runs a function in every process and raises in all of them what is raised in one: nothing is changed before each
    process has checked all that it is going to read; then `checked` is true in all of them. Raises StorageError for a layout
    that is damaged.
    """

    def __init__(self, path: str, files: dict[str, Any], agree: Callable[[Callable[[], None]], object]) -> None:
        self.path, self.files, self.agree = path, files, agree
        self.checked = False
        self.pieces = {MetadataIndex(piece.name, piece.offsets): piece for piece in read_layout(path, files)}

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        for piece in self.pieces.values():
            if piece.name not in tensors:
                properties = TensorProperties(dtype=piece.slot.dtype)
                tensors[piece.name] = TensorStorageMetadata(properties, torch.Size(piece.size), [])
            chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.slot.shape))
            tensors[piece.name].chunks.append(chunk)
        return Metadata(tensors)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        self.agree(lambda: self._check(plan.items))
        self.checked = True
        for item, tensor in zip(plan.items, read_ahead(self._read, plan.items), strict=True):
            target = planner.resolve_tensor(item).detach()
            target.copy_(tensor)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _check(self, items: list[ReadItem]) -> None:
        """Raise StorageError if any of the parts that these items lie in is missing or altered."""
        parts = set()
        for item in items:
            piece, slot = self._find(item)
            parts |= {(piece.file, part) for part in parts_of(self.files[piece.file], slot.start, slot.end)}
        for _ in read_ahead(lambda part: self._check_part(*part), sorted(parts)):
            pass

    def _check_part(self, file: str, number: int) -> None:
        check_part(storage.join(self.path, file), self.files[file], number)

    def _read(self, item: ReadItem) -> Tensor:
        piece, slot = self._find(item)
        [data] = read_ranges(storage.join(self.path, piece.file), [(slot.start, slot.end)])
        tensor = slot.tensor(data)
        for dimension, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            if dimension:
                tensor = tensor.narrow(dimension, offset, length)
        return tensor

    def _find(self, item: ReadItem) -> tuple[Piece, Slot]:
        piece = self.pieces[item.storage_index]
        return piece, piece.box(item.storage_offsets, item.lengths)

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def read_layout(path: str, files: dict[str, Any]) -> list[Piece]:
    """The pieces of a checkpoint. files: its manifest's entries.

    Raises StorageError for a layout that is altered, that leads out of the files, or whose pieces are not whole tensors.
    """
    source = storage.join(path, LAYOUT)
    data = storage.read_bytes(source)
    try:
        if hashlib.sha256(data).hexdigest() != files[LAYOUT]["sha256"]:
            raise ValueError("its SHA-256 is not the manifest's")
        return [piece for name, value in json.loads(data)["tensors"].items() for piece in _pieces(name, value, files)]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise StorageError(
            f"{source}: not a checkpoint's layout ({error!r})", f"delete {path} and run again"
        ) from error


def _pieces(name: str, value: dict[str, Any], files: dict[str, Any]) -> Iterator[Piece]:
    size, dtype, seen = _sizes(value["size"]), DTYPES[value["dtype"]], set()
    elements = 0
    for described in value["pieces"]:
        offsets, shape, [start] = _sizes(described["offsets"]), _sizes(described["shape"]), _sizes([described["start"]])
        slot, file = Slot(dtype, shape, start), described["file"]
        inside = all(first + count <= whole for first, count, whole in zip(offsets, shape, size, strict=True))
        if not inside or offsets in seen or slot.end > files[file]["parts"]["ends"][-1]:
            raise ValueError(f"{name}: {described}")
        seen.add(offsets)
        elements += math.prod(shape)
        yield Piece(name, size, offsets, file, slot)
    if elements != math.prod(size):
        raise ValueError(f"{name}: {elements} of {math.prod(size)} values")


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(number) is not int or number < 0 for number in value):
        raise ValueError(f"{value!r}")
    return tuple(value)
