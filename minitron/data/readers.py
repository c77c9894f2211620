"""Reading files of text: whole files, parts between separators, lines or arrays of JSON, CSV, and parquet.

A reader yields (suffix of the document's id, text); text is None for a row that is left out. It reads a range of the file's
bytes if the format can be divided; the ranges of a file together give what the whole file gives.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from minitron.data.compression import encoding_of
from minitron.data.fields import RowText, shortened, top_level
from minitron.data.sources import TextSource
from minitron.errors import InputError

LONGEST_DOCUMENT = 2**30  # bytes or characters; what is longer is not one text, and would not fit into memory
LONGEST_SEPARATOR = 2**16  # characters
BLOCK = 2**20  # bytes decoded at a time
_BETWEEN_ELEMENTS = re.compile(r"[ \t\r\n,]*")
_LINES = "write one JSON object per line; for plain text use kind: text"
Texts = Iterator[tuple[str, str | None]]


@dataclass(frozen=True)
class Range:
    """Bytes [start, end) of a file; end None: to its end."""

    start: int = 0
    end: int | None = None


def read_text(file: io.BufferedReader, path: str, source: TextSource, text: RowText, within: Range) -> Texts:
    """A file as one document, or the documents between separators."""
    separator = source.separator_pattern()
    if separator is None:
        data = file.read(LONGEST_DOCUMENT + 1)
        if len(data) > LONGEST_DOCUMENT:
            raise InputError(
                f"{path}: more than {LONGEST_DOCUMENT >> 30} GB, and kind: text reads each file as one document",
                'set separator to what stands between its documents, such as blank-line or "<|endoftext|>"',
            )
        yield "", _decode(data, path)
        return
    for number, document in enumerate(_between(_decoded(file, path), separator, path)):
        yield f":{number}", document


def _between(blocks: Iterator[str], separator: re.Pattern[str], path: str) -> Iterator[str]:
    """The texts between matches of `separator`, which have at most LONGEST_SEPARATOR characters, as what it looks at before and
    after them has."""
    buffer = ""
    start = scanned = 0  # positions in it: of the current document, and up to which it has no further match
    for block in blocks:
        buffer += block
        certain = len(buffer) - LONGEST_SEPARATOR  # a match that ends after it may be another one with more text
        for match in separator.finditer(buffer, max(start, scanned)):
            if match.end() > certain:
                break
            yield buffer[start : match.start()]
            start = match.end()
        if len(buffer) - start > LONGEST_DOCUMENT:
            raise InputError(f"{path}: no separator in {len(buffer):,} characters", "check separator against the file")
        cut = max(0, start - LONGEST_SEPARATOR)
        buffer, start = buffer[cut:], start - cut
        scanned = max(0, certain - LONGEST_SEPARATOR - cut)
    for match in separator.finditer(buffer, max(start, scanned)):
        yield buffer[start : match.start()]
        start = match.end()
    yield buffer[start:]


def read_json(file: io.BufferedReader, path: str, source: TextSource, text: RowText, within: Range) -> Texts:
    """JSON lines, or one array of JSON objects. Only lines in UTF-8 are divided; the first range reads anything else."""
    beginning = file.peek(256)[:256] if not within.start else _beginning(file)
    encoding, mark = encoding_of(beginning)
    is_array = beginning[mark:].decode(encoding, "ignore").lstrip().startswith("[")
    if within.start and (is_array or encoding != "utf-8"):
        return
    if is_array:
        yield from _array(_decoded(file, path), text, path)
        return
    lines = _utf8_lines(file, path, within) if encoding == "utf-8" else _text_lines(file, encoding, mark, path)
    for number, line in lines:
        if not line.strip():
            continue
        location = _Line(path, number, within.start, file)
        yield f":{number}", text(_parsed(line, location), location)


def _beginning(file: io.BufferedReader) -> bytes:
    file.seek(0)
    return file.read(256)


@dataclass(frozen=True)
class _Line:
    """A line for messages. Its number is counted only when it is printed, if the range does not begin with the file."""

    path: str
    number: int
    start: int
    file: io.BufferedReader

    def __str__(self) -> str:
        before = 0
        if self.start:
            self.file.seek(0)
            left = self.start - 1
            while left > 0 and (block := self.file.read(min(left, BLOCK))):
                before += block.count(b"\n")
                left -= len(block)
            before += 1  # the line that the range before it finishes
        return f"{self.path}, line {before + self.number}"


def _utf8_lines(file: io.BufferedReader, path: str, within: Range) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of the lines that begin in the range."""
    position = 0
    if within.start:
        file.seek(within.start - 1)
        position = within.start - 1 + len(file.readline())  # the rest of a line that begins before the range
    number = 0
    while within.end is None or position < within.end:
        line = file.readline(LONGEST_DOCUMENT + 1)
        if not line:
            return
        number += 1
        position += len(line)
        location = _Line(path, number, within.start, file)
        if len(line) > LONGEST_DOCUMENT:
            raise InputError(f"{location}: more than {LONGEST_DOCUMENT >> 30} GB", _LINES)
        yield number, _decode(line, location, "utf-8")


def _text_lines(file: io.BufferedReader, encoding: str, mark: int, path: str) -> Iterator[tuple[int, str]]:
    """The same for the whole of a file in another encoding."""
    file.read(mark)
    number = 1
    try:
        for number, line in enumerate(io.TextIOWrapper(file, encoding, newline="\n"), start=1):
            yield number, line
    except UnicodeDecodeError as error:
        raise _not_decodable(f"{path}, after line {number}", encoding, error) from error


def _array(blocks: Iterator[str], text: RowText, path: str) -> Texts:
    """The elements of one JSON array, without keeping all of it in memory."""
    decoder = json.JSONDecoder()
    buffer = next(blocks, "")
    position = buffer.find("[") + 1
    number = 0
    while True:
        location = f"{path}, element {number}"
        position = _BETWEEN_ELEMENTS.match(buffer, position).end()  # type: ignore[union-attr]  # it matches anywhere
        if buffer.startswith("]", position):
            return
        try:
            value, end = decoder.raw_decode(buffer, position)
            complete = end < len(buffer)  # a number may go on
            problem = "the array has no end"
        except json.JSONDecodeError as error:
            complete, problem = False, f"{error.msg} at character {error.pos - position} of the element"
        except (RecursionError, ValueError) as error:
            raise _not_json(location, str(error), buffer[position : position + 200]) from error
        if complete:
            yield f":{number}", text(value, location)
            number += 1
            position = end
            continue
        buffer = buffer[position:]
        position = 0
        # twice as much each time, so that a long element is not parsed again and again
        more = "".join(block for _, block in zip(range(1 + len(buffer) // BLOCK), blocks, strict=False))
        if not more or len(buffer) > LONGEST_DOCUMENT:
            raise _not_json(location, problem, buffer[:200])
        buffer += more


def read_csv(file: io.BufferedReader, path: str, source: TextSource, text: RowText, within: Range) -> Texts:
    """Rows of a file with a header; separated by commas, or by tabs in a .tsv file."""
    csv.field_size_limit(LONGEST_DOCUMENT)
    delimiter = "\t" if re.search(r"\.tsv(\.\w+)?$", path) else ","
    encoding, mark = encoding_of(file.peek(4)[:4])
    file.read(mark)
    rows = csv.reader(io.TextIOWrapper(file, encoding, newline=""), delimiter=delimiter, strict=True)
    number = 0
    try:
        header = next(rows, [])
        _check_columns(source, header, path)
        for number, fields in enumerate(rows, start=1):
            location = f"{path}, row {number} (line {rows.line_num})"
            if not fields:
                continue
            if len(fields) > len(header):
                raise InputError(
                    f"{location}: {len(fields)} fields, but the header has {len(header)}",
                    "put fields that contain the separator in quotes",
                )
            yield f":{number}", text(dict(zip(header, fields, strict=False)), location)
    except csv.Error as error:
        raise InputError(f"{path}, after row {number}: not valid CSV ({error})", "correct its quotes") from error
    except UnicodeDecodeError as error:
        raise _not_decodable(f"{path}, after row {number}", encoding, error) from error


def read_parquet(file: io.BufferedReader, path: str, source: TextSource, text: RowText, within: Range) -> Texts:
    """Rows of the row groups that begin in the range."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file)
        columns = _check_columns(source, table.schema_arrow.names, path)
        number = 0
        for group in range(table.metadata.num_row_groups):
            rows = table.metadata.row_group(group)
            if not within.start <= _first_byte(rows) < (within.end or LONGEST_DOCUMENT**2):
                number += rows.num_rows
                continue
            for batch in table.iter_batches(columns=columns, batch_size=1024, row_groups=[group]):
                for row in batch.to_pylist():
                    yield f":{number}", text(row, f"{path}, row {number}")
                    number += 1
    except arrow.ArrowException as error:
        raise InputError(f"{path}: not a readable parquet file ({error})", "write or download it again") from error


def _first_byte(group: Any) -> int:
    """Where the data of a row group begins."""
    first = group.column(0)
    offsets = (first.dictionary_page_offset, first.data_page_offset)
    return min(offset for offset in offsets if offset is not None)


def _check_columns(source: TextSource, names: list[str], path: str) -> list[str]:
    """The columns that the source's text is made of. Raises InputError for one that the file does not have, or has twice."""
    for key in source.columns():
        column = top_level(key, names)
        if not column:
            columns = ", ".join(names)
            raise InputError(f"{path}: no column {key!r}", f"set key to one of its columns: {columns}")
        if names.count(column) > 1:
            raise InputError(f"{path}: {names.count(column)} columns are called {column!r}", "rename all but one")
    return list(dict.fromkeys(top_level(key, names) for key in source.columns()))


def _parsed(line: str, location: Any) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise _not_json(location, f"{error.msg} at column {error.colno}", line) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, integers of thousands of digits
        raise _not_json(location, str(error), line) from error


def _not_json(location: Any, problem: str, content: str) -> InputError:
    return InputError(f"{location}: not JSON ({problem}): {shortened(content[:200])}", _LINES)


def _decoded(file: io.BufferedReader, path: str) -> Iterator[str]:
    """A file's text in blocks."""
    encoding, mark = encoding_of(file.peek(4)[:4])
    file.read(mark)
    decoder = codecs.getincrementaldecoder(encoding)()
    position = mark
    while data := file.read(BLOCK):
        try:
            yield decoder.decode(data)
        except UnicodeDecodeError as error:
            raise _not_decodable(f"{path}, in the megabyte from byte {position} on", encoding, error) from error
        position += len(data)
    try:
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_decodable(f"{path}, at its end", encoding, error) from error


def _decode(data: bytes, location: Any, encoding: str = "") -> str:
    """Bytes as text: in `encoding`, or in that of their byte-order mark; the mark itself is left out."""
    marked, mark = encoding_of(data[:4])
    if encoding and marked != encoding:
        mark = 0
    encoding = encoding or marked
    try:
        return data[mark:].decode(encoding)
    except UnicodeDecodeError as error:
        raise _not_decodable(location, encoding, error, error.start + mark) from error


def _not_decodable(location: Any, encoding: str, error: UnicodeDecodeError, position: int | None = None) -> InputError:
    at = f" at {position}" if position is not None else ""
    return InputError(
        f"{location}: not {encoding.upper()} (byte 0x{error.object[error.start]:02x}{at})",
        "convert it to UTF-8, or narrow path with a glob such as folder/*.txt",
    )


# kind -> (file, path, source, text of a row, range) -> (suffix of the document's id, text)
READERS: dict[str, Callable[[io.BufferedReader, str, TextSource, RowText, Range], Texts]] = {
    "text": read_text,
    "jsonl": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
}
