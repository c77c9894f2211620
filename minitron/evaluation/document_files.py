"""The documents of one file: JSON lines, also compressed, parquet, or an Arrow folder. Damage is named by file and line."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.errors import InputError

if TYPE_CHECKING:
    import datasets

LONGEST_REASON = 250


def read_file(path: Path) -> datasets.Dataset:
    """All documents of a file or Arrow folder, in memory. Raises InputError if it cannot be read."""
    import datasets
    import pyarrow.parquet

    if path.is_dir() or path.suffix == ".parquet":
        with readable(path):
            if path.is_dir():
                return datasets.Dataset.load_from_disk(str(path), keep_in_memory=True)
            return datasets.Dataset(pyarrow.parquet.read_table(path))
    numbered = list(numbered_json(path))
    try:
        return datasets.Dataset.from_list([document for _, document in numbered])
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise InputError(
            f"{path}{_other_type(numbered)}: its documents cannot be read as one table "
            f"({' '.join(str(error).split())[:LONGEST_REASON]})",
            "give every document the same fields, each with values of one type",
        ) from error


def _other_type(numbered: list[tuple[int, dict[str, Any]]]) -> str:
    """Where a field first has a value of another type than in the documents before: ", line 3, field 'label': text after a
    number"; empty if nowhere."""
    first: dict[str, tuple[str, int]] = {}
    for line, document in numbered:
        for name, value in document.items():
            if value is None:
                continue
            kind = next((words for types, words in _KINDS if isinstance(value, types)), "a value")
            before, there = first.setdefault(name, (kind, line))
            if kind != before:
                return f", line {line}, field {name!r}: {kind}, and {before} on line {there}"
    return ""


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "true or false"),
    ((int, float), "a number"),
    (str, "text"),
    (list, "a list"),
    (dict, "an object"),
)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise InputError for a file that cannot be read, or is not what its name says."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, ValueError, TypeError, KeyError, OSError) as error:
        kind = "an Arrow folder (Dataset.save_to_disk)" if path.is_dir() else "a whole parquet file"
        raise InputError(
            f"{path}: its documents cannot be read: is not {kind} ({' '.join(str(error).split())[:LONGEST_REASON]})",
            "copy or download it again",
        ) from error


def json_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, which may be compressed by gzip or Zstandard. Raises InputError if that is damaged."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as unpacked:
                yield from unpacked
        elif path.suffix == ".zst":
            import pyarrow

            with open(path, "rb") as packed, pyarrow.CompressedInputStream(packed, "zstd") as stream:
                yield from io.BufferedReader(stream)
        else:
            with open(path, "rb") as lines:
                yield from lines
    except (OSError, EOFError, zlib.error) as error:
        what = "unpacked" if path.suffix in (".gz", ".zst") else "read"
        raise InputError(f"{path}: cannot be {what} ({error})", "copy or download it again") from error


def numbered_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The documents of a file with the numbers of their lines, from 1; empty lines are none."""
    for number, line in enumerate(json_lines(path), start=1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not text.strip():
            continue
        try:
            document = json.loads(text)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}, line {number}: not UTF-8 ({error.reason}, byte {error.start + 1})", "save the file as UTF-8"
            ) from error
        except (ValueError, RecursionError) as error:  # also for a number of 5,000 digits
            raise InputError(
                f"{path}, line {number}: not JSON ({error})", "write one JSON object on each line"
            ) from error
        if not isinstance(document, dict):
            raise InputError(f"{path}, line {number}: not a JSON object", "write one JSON object on each line")
        if b"\\ud" in text or b"\\uD" in text:
            _check_surrogates(document, f"{path}, line {number}")
        yield number, document


def _check_surrogates(document: dict[str, Any], place: str) -> None:
    """Raise InputError for half a surrogate pair, which JSON can write and UTF-8 cannot. place: of the document."""
    for name, value in document.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{place}, field {name!r}: has half a surrogate pair, {error.object[error.start]!r}, which is no character",
                "remove it, or write the whole character",
            ) from error
