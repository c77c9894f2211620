"""GGUF files in remote storage of which only the header is needed."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from minitron import storage
from minitron.checkpoints.gguf_header import header_bytes
from minitron.storage.ranges import read_ranges

FIRST_BYTES = 8 * 2**20  # read at first; a vocabulary of 128,000 tokens with its merges takes 8 MB


def header_copy(source: str) -> Path:
    """A local file of the length of an uploaded GGUF file, with its header and holes instead of its weights: it takes no more
    room than the header. It exists until this process ends.

    Raises InputError if `source` was not uploaded, and StorageError if it cannot be read.
    """
    return _copy(source, storage.uploaded_size(source))


@lru_cache(maxsize=4)
def _copy(source: str, size: int) -> Path:
    length = min(FIRST_BYTES, size)
    while True:
        [data] = read_ranges(source, [(0, length)])
        if length == size or header_bytes(bytes(data), size) is not None:
            break
        length = min(4 * length, size)
    folder = Path(tempfile.mkdtemp(prefix="minitron-gguf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "header.gguf"
    with path.open("wb") as file:
        file.write(data)
        file.truncate(size)
    return path
