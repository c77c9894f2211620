"""Safetensors files written without a copy of their tensors, with the checksums of their parts, and read by range."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from minitron.errors import StorageError
from minitron.storage.ranges import Buffer, read_checked

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in safetensors' headers."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_BYTES = 4096  # read at first; the header of a few tensors is smaller
LONGEST_HEADER = 100 << 20  # as in safetensors


@dataclass(frozen=True)
class Slot:
    """Where a tensor is in a file: the bytes from `start`, row-major."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    def rows(self, first: int, last: int) -> Slot:
        """The part [first, last) of dimension 0."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return Slot(self.dtype, (last - first, *self.shape[1:]), self.start + first * row)

    def tensor(self, data: Buffer) -> Tensor:
        """The tensor whose bytes these are; its memory is `data`, or a copy of bytes."""
        if not data:
            return torch.empty(self.shape, dtype=self.dtype)
        memory = bytearray(data) if isinstance(data, bytes) else data
        return torch.frombuffer(memory, dtype=self.dtype).view(self.shape)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], part_bytes: int | None = None
) -> tuple[dict[str, Any], dict[str, Slot]]:
    """Write a safetensors file; its entry for a manifest, and where each tensor is.

    part_bytes: the length of a part that has a checksum of its own; by default a row of a tensor, which must not be empty, is
    a part. Raises KeyError for a dtype that DTYPES does not have.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # aligned, as safetensors does it
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        tensor = tensors[name]
        described[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    base = 8 + len(header)
    slots = {
        name: Slot(tensors[name].dtype, tuple(tensors[name].shape), base + described[name]["data_offsets"][0])
        for name in order
    }
    total = base + position
    if part_bytes:
        ends = [*range(part_bytes, total, part_bytes), total]
    else:
        ends = [base, *(slot.rows(row, row + 1).end for slot in slots.values() for row in range(slot.shape[0]))]
    with open(path, "wb") as file:
        hashed = _Hashed(file, ends)
        hashed.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            hashed.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.entry(), slots


class _Hashed:
    """A file, and the SHA-256 of the whole and of each part that is written to it."""

    def __init__(self, file: BinaryIO, ends: Sequence[int]) -> None:
        self.file, self.ends = file, ends
        self.whole, self.part = hashlib.sha256(), hashlib.sha256()
        self.position = 0
        self.hashes: list[str] = []

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            piece = view[: self.ends[len(self.hashes)] - self.position]
            self.file.write(piece)
            self.whole.update(piece)
            self.part.update(piece)
            self.position += len(piece)
            view = view[len(piece) :]
            if self.position == self.ends[len(self.hashes)]:
                self.hashes.append(self.part.hexdigest())
                self.part = hashlib.sha256()

    def entry(self) -> dict[str, Any]:
        parts = {"ends": list(self.ends), "sha256": self.hashes}
        return {"bytes": self.position, "sha256": self.whole.hexdigest(), "parts": parts}


def read_slots(path: str, entry: Mapping[str, Any]) -> dict[str, Slot]:
    """Where each tensor of a safetensors file is. entry: the file's in its manifest.

    Raises StorageError for a header that is damaged, or whose tensors are not inside the file.
    """
    size = entry["bytes"]
    try:
        if size < 8:
            raise ValueError(f"{size} bytes")
        # where rows are parts, the first part is the header
        first = entry["parts"]["ends"][0] if entry.get("parts") else size
        [begin] = read_checked(path, entry, [(0, max(8, min(HEADER_BYTES, first, size)))])
        base = 8 + int.from_bytes(begin[:8], "little")
        if base > min(size, LONGEST_HEADER):
            raise ValueError(f"a header of {base - 8} bytes")
        if base > len(begin):
            begin = bytes(begin) + bytes(read_checked(path, entry, [(len(begin), base)])[0])
        return dict(_slots(json.loads(bytes(begin[8:base])), base, size))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path}: not a safetensors file ({error!r})", "delete its folder and run again") from error


def _slots(header: dict[str, Any], base: int, size: int) -> Iterator[tuple[str, Slot]]:
    for name, value in header.items():
        if name == "__metadata__":
            continue
        shape, (start, end) = value["shape"], value["data_offsets"]
        slot = Slot(DTYPES[value["dtype"]], tuple(shape), base + start)
        if not all(type(number) is int and number >= 0 for number in (*shape, start)):
            raise ValueError(f"{name}: shape {shape} from byte {start}")
        if slot.nbytes != end - start or slot.end > size:
            raise ValueError(f"{name}: bytes {start} to {end}")
        yield name, slot
