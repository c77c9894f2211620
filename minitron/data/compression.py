"""Opening the files of a text source: decompressed, with the encoding that their first bytes say."""

from __future__ import annotations

import codecs
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import fsspec
from fsspec.utils import infer_compression

from minitron.errors import InputError, StorageError

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
            file = stack.enter_context(fs.open(path, "rb", compression=compression))
            if codec:
                import pyarrow

                file = stack.enter_context(pyarrow.CompressedInputStream(file, codec))
            yield stack.enter_context(io.BufferedReader(file, BUFFER))
    except PermissionError as error:
        raise StorageError(f"{path}: no permission to read it", "change its permissions, or leave it out") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise StorageError(f"{path}: cannot be read completely ({error})", "download or compress it again") from error
