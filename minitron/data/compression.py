"""Opening the files of a text source: decompressed, with the encoding that their first bytes say."""

from __future__ import annotations

import codecs
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import fsspec
from fsspec.compression import compr
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression

from minitron.errors import InputError, StorageError
from minitron.storage import access_errors

SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".snappy")
_OF_ARROW = {".zst": "zstd", ".lz4": "lz4"}  # suffix: pyarrow's codec, which needs no further package
BUFFER = 2**20  # bytes read at a time
_MARKS = (  # the one of UTF-32 begins like that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def is_compressed(path: str) -> bool:
    """Whether a file's name says that it is compressed."""
    return path.endswith(SUFFIXES)


def encoding_of(beginning: bytes) -> tuple[str, int]:
    """(encoding, length of the byte-order mark) of a file by its first four bytes; UTF-8 without a mark."""
    return next(((encoding, len(mark)) for mark, encoding in _MARKS if beginning.startswith(mark)), ("utf-8", 0))


class _RemoteFile(io.RawIOBase):
    """A file of a remote file system, whose driver has error types of its own: they become StorageError."""

    def __init__(self, file: Any, address: str) -> None:
        self.file = file
        self.address = address

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self.file.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self.file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        with access_errors(self.address):
            piece = self.file.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


@contextmanager
def _file(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[Any]:
    """The bytes of a file as they are stored."""
    if isinstance(fs, LocalFileSystem):
        with fs.open(path, "rb") as stored:
            yield stored
        return
    address = fs.unstrip_protocol(path)
    with access_errors(address):
        stored = fs.open(path, "rb")
    with stored:
        yield _RemoteFile(stored, address)


@contextmanager
def opened(fs: fsspec.AbstractFileSystem, path: str, *, plain: bool = False) -> Iterator[io.BufferedReader]:
    """The bytes of a file, decompressed by its suffix unless `plain`. Files that are not compressed can be sought.

    Raises StorageError naming a file that cannot be read or is damaged, also while it is read, InputError for an archive.
    """
    suffix = "." + path.rsplit(".", 1)[-1]
    codec = None if plain else _OF_ARROW.get(suffix)
    compression = None if plain or codec else infer_compression(path)
    if compression == "zip":
        raise InputError(f"{path}: zip archives are not supported", "unpack it, or compress the file with gzip")
    if compression is None and not plain and suffix == ".snappy":
        raise InputError(f"{path}: cannot read .snappy here", "pip install cramjam, or unpack the file")
    try:
        with ExitStack() as stack:
            file: Any = stack.enter_context(_file(fs, path))
            if compression:
                file = stack.enter_context(compr[compression](file, mode="r"))
            if codec:
                import pyarrow

                file = stack.enter_context(pyarrow.CompressedInputStream(file, codec))
            yield stack.enter_context(io.BufferedReader(file, BUFFER))
    except PermissionError as error:
        raise StorageError(f"{path}: no permission to read it", "change its permissions, or leave it out") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise StorageError(f"{path}: cannot be read completely ({error})", "download or compress it again") from error
