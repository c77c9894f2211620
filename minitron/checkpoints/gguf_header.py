"""A GGUF file's header: checked before the package gguf reads it, which believes every count and length in it, and what it says
of the tensors.

The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from minitron.checkpoints.limits import LARGEST_SIZE, MOST_EXPERTS, MOST_LAYERS
from minitron.errors import InputError

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""struct's format of a value, by GGUF's number of its type."""
MOST_ELEMENTS = (
    10_000_000  # of all arrays; gguf makes an object of hundreds of bytes of each. A vocabulary has 1,000,000
)
MOST_TENSORS = 1_000_000
MOST_KEYS = 10_000  # files have less than a hundred
LONGEST_TEXT = 256  # characters that are kept of a value
MOST_DIMENSIONS = 8  # gguf has 4
LEAST_PAIR = 8 + 4 + 1  # bytes of a key and a value: length, type, value
LEAST_TENSOR = 8 + 4 + 4 + 8  # bytes of a tensor's entry: length, dimensions, type, offset
LEAST_ALIGNMENT, MOST_ALIGNMENT = 32, 2**16  # of the first tensor, in bytes; the least is the default
ARCHITECTURE, ALIGNMENT = "general.architecture", "general.alignment"
TOKENIZER = "tokenizer."
LIMITS = {
    ".block_count": MOST_LAYERS,
    ".expert_count": MOST_EXPERTS,
    ".embedding_length": LARGEST_SIZE,
    ".feed_forward_length": LARGEST_SIZE,
    ".expert_feed_forward_length": LARGEST_SIZE,
    ".vocab_size": LARGEST_SIZE,
    ".attention.key_length": LARGEST_SIZE,
    ".attention.head_count": LARGEST_SIZE,
    ".attention.head_count_kv": LARGEST_SIZE,
}
"""By the end of a key."""
Value = str | int | float | tuple[str | int | float, ...]
"""An array is a tuple, an empty one if it is longer than `MOST_LAYERS` or holds texts or floats. Bools are 0 and 1."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a GGUF file: its shape in torch's order, ggml's number of its type, and its first byte in the file."""

    shape: tuple[int, ...]
    type: int
    start: int


@dataclass(frozen=True, eq=False)
class GgufHeader:
    """What the header of a GGUF file says, one object as long as the file does not change: its path, struct's byte order, the
    architecture in llama.cpp's spelling, the tensors by name, and the values of the architecture's keys by key without the
    architecture (`rope.scaling.type`)."""

    path: Path
    order: str
    architecture: str
    tensors: Mapping[str, StoredTensor] = field(repr=False)  # hundreds
    values: Mapping[str, Value] = field(repr=False)


class _InvalidHeader(Exception):
    """A count or length that the file cannot have."""


def check_gguf(path: Path) -> GgufHeader:
    """The header of a GGUF file. Raises InputError unless its counts, lengths and offsets lie inside the file and can be a
    model's.

    A file that has not changed since is not looked at again: a vocabulary takes tenths of a second.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "check the path and its permissions") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is not a file", "give the path of a .gguf file")
    return _check(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=8)
def _check(path: Path, *_: int) -> GgufHeader:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Header(data, len(data))
            header.check()
            return header.contents(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "check its permissions") from error
    except (_InvalidHeader, struct.error, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise InputError(f"{path}: is not a whole GGUF file ({error})", "download or copy it again") from error


def header_bytes(data: bytes | bytearray, size: int) -> int | None:
    """Length in bytes of the header of a GGUF file of `size` bytes that begins with `data`; None if more of the file is needed
    to know, or if it is not a GGUF file."""
    try:
        header = _Header(data, size)
        header.check()
    except (_InvalidHeader, struct.error):
        return None
    return header.position if header.position <= len(data) else None


class _Header:
    """Walks through the header of a file of `size` bytes that begins with `data`. Every read is checked by struct, which
    refuses to read beyond the end of the data."""

    def __init__(self, data: mmap.mmap | bytes | bytearray, size: int) -> None:
        self.data, self.size, self.position = data, size, len(MAGIC)
        if data[: len(MAGIC)] != MAGIC:
            raise _InvalidHeader("it does not begin with GGUF")
        self.order = "<"
        if struct.unpack_from("<I", data, self.position)[0] & 0xFFFF == 0:
            self.order = ">"  # the version in the other byte order
        self.read("I")
        self.elements = 0
        self.kept: dict[str, Value] = {}  # of all keys but the tokenizer's
        self.tensors: dict[str, StoredTensor] = {}  # without the position of the first one

    def read(self, kind: str) -> int:
        return int(self.number(kind))

    def number(self, kind: str) -> int | float:
        [value] = struct.unpack_from(self.order + kind, self.data, self.position)
        self.position += struct.calcsize(self.order + kind)
        return float(value) if kind in "fd" else int(value)

    def skip(self, count: int, size: int) -> None:
        if count * size > self.size - self.position:
            raise _InvalidHeader(f"{count:,} values of {size} bytes at byte {self.position:,} of {self.size:,}")
        self.position += count * size

    def string(self) -> bytes:
        length = self.read("Q")
        start = self.position
        self.skip(length, 1)
        return bytes(self.data[start : self.position]) if length <= 2**16 else b""

    def check(self) -> None:
        tensors, pairs = self.read("Q"), self.read("Q")
        room = self.size - self.position
        if tensors > MOST_TENSORS or pairs > MOST_KEYS or tensors * LEAST_TENSOR + pairs * LEAST_PAIR > room:
            raise _InvalidHeader(f"{tensors:,} tensors and {pairs:,} keys in {self.size:,} bytes")
        for _ in range(pairs):
            key = self.string().decode(errors="replace")
            kind = self.read("I")
            values = tuple(self._values(kind, nested=False))
            for value in values:
                if not isinstance(value, str):
                    self._check_size(key, value)
            if key.startswith(TOKENIZER):
                continue
            if key in self.kept:  # gguf takes the first one
                raise _InvalidHeader(f"key {key[:100]!r} twice")
            self.kept[key] = values if kind == ARRAY else values[0]
        for _ in range(tensors):
            self._check_tensor()

    def contents(self, path: Path) -> GgufHeader:
        """What the header says, after `check`."""
        architecture = str(self.kept.get(ARCHITECTURE, ""))
        alignment = self.kept.get(ALIGNMENT, LEAST_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= MOST_ALIGNMENT:
            raise _InvalidHeader(f"{ALIGNMENT} is {alignment!r}")
        own = f"{architecture}."
        first = math.ceil(self.position / alignment) * alignment
        return GgufHeader(
            path,
            self.order,
            architecture,
            {name: replace(tensor, start=first + tensor.start) for name, tensor in self.tensors.items()},
            {key.removeprefix(own): value for key, value in self.kept.items() if key.startswith(own)},
        )

    def _values(self, kind: int, *, nested: bool) -> Iterator[str | int | float]:
        """The numbers and the text of a value; those of long arrays, and texts in arrays, are skipped."""
        if kind in SCALARS:
            yield self.number(SCALARS[kind])
        elif kind == STRING:
            text = self.string()
            if not nested:
                yield text.decode(errors="replace")[:LONGEST_TEXT]
        elif kind == ARRAY and not nested:
            inner, count = self.read("I"), self.read("Q")
            self.elements += count
            if self.elements > MOST_ELEMENTS:
                raise _InvalidHeader(f"arrays of more than {MOST_ELEMENTS:,} values")
            if inner in SCALARS:
                start, size = self.position, struct.calcsize(self.order + SCALARS[inner])
                self.skip(count, size)
                if count <= MOST_LAYERS and SCALARS[inner] not in "fd":  # such as one size for each layer
                    yield from struct.unpack_from(f"{self.order}{count}{SCALARS[inner]}", self.data, start)
                return
            for _ in range(count):
                yield from self._values(inner, nested=True)
        else:
            raise _InvalidHeader(f"a value of type {kind}")

    def _check_size(self, key: str, value: int | float) -> None:
        limit = next((limit for end, limit in LIMITS.items() if key.endswith(end)), None)
        if limit is not None and value > limit:
            raise _InvalidHeader(f"{key[:100]} is {value:,}; the largest that is possible is {limit:,}")

    def _check_tensor(self) -> None:
        full = self.string().decode(errors="replace")
        name = full[:100]
        dimensions = self.read("I")
        if dimensions > MOST_DIMENSIONS:
            raise _InvalidHeader(f"tensor {name!r} has {dimensions:,} dimensions")
        shape = [self.read("Q") for _ in range(dimensions)]
        kind = self.read("I")
        offset = self.read("Q")
        # a weight has one bit at least
        if offset > self.size or math.prod(shape) > 8 * self.size:
            raise _InvalidHeader(f"tensor {name!r} of shape {shape} from byte {offset:,} in {self.size:,} bytes")
        if full in self.tensors:
            raise _InvalidHeader(f"tensor {name!r} twice")
        self.tensors[full] = StoredTensor(tuple(reversed(shape)), kind, offset)
