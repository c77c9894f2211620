"""The documents of a text source: Python's own documentation, files of text, JSON, CSV or parquet, or the Hugging Face hub.

Every kind yields the same documents in the same order each time. Files are visited in the order of their names' hashes, so
that the first documents are a fair sample and a reader may stop early.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from minitron.arguments import check_type
from minitron.data import hub
from minitron.data.compression import opened
from minitron.data.fields import RowText
from minitron.data.parts import Part, whole
from minitron.data.python_docs import python_documents
from minitron.data.readers import READERS
from minitron.data.sources import TextSource
from minitron.errors import InputError
from minitron.storage import filesystem, is_local


@dataclass(frozen=True)
class Document:
    """One text. `id` is a module's name, or a file's path (relative to the common folder) with a line or row number."""

    id: str
    text: str


@dataclass
class LeftOut:
    """Number of documents that were left out: rows without a value, and texts of another length than those wanted."""

    missing: int = 0
    length: int = 0


def documents(source: TextSource, tokenizer: Any = None) -> Iterator[Document]:
    """Read the documents of a source lazily; documents that are only whitespace are left out.

    text: one document per file, or between separators. jsonl: one per line, blank lines are skipped; or one per element of an
    array. csv, parquet: one per row. Files of text, jsonl and csv may be compressed (.gz, .bz2, .xz, .zst, .lz4) and be in
    UTF-8, or UTF-16 or UTF-32 with a byte-order mark. A folder stands for the files below it with the kind's suffix, for text
    all files; hidden files are left out. Files are read in the order of their names' hashes, lines and rows in file order.
    Symbolic links are followed. tokenizer: for a source with `messages`.

    Raises InputError naming the file, line, key and value that cannot be used, or if the source contains no text; StorageError
    for a file that cannot be read.
    """
    check_type("source", source, TextSource)
    left_out = LeftOut()
    empty = True
    for document in part_documents(source, whole(source), tokenizer, left_out):
        empty = False
        yield document
    if empty:
        raise no_text(source, left_out)


def check_first_row(source: TextSource) -> None:
    """Raise what `documents` raises for the first row of a source of files on this machine, for example if it has no field
    `key`. Other sources, and chats, are not read."""
    if source.kind in ("jsonl", "csv", "parquet") and source.messages is None and is_local(source.path):
        part = whole(source)
        next(_file_texts(source, replace(part, files=part.files[:1]), RowText(source)), None)


def check_chat_template(source: TextSource, tokenizer: Any) -> None:
    """Raise InputError if a source contains chats and the tokenizer has no template for them."""
    RowText(source, tokenizer)


def no_text(source: TextSource, left_out: LeftOut) -> InputError:
    """The error for a source without documents."""
    if left_out.missing or left_out.length:
        reasons = f"{left_out.missing} rows have no value, {left_out.length} texts have another length"
        return InputError(
            f"{source.label}: no text is left ({reasons})", "check key, min_characters and max_characters"
        )
    return InputError(f"{source.label}: it contains no text", "check path and key")


def part_documents(source: TextSource, part: Part, tokenizer: Any, left_out: LeftOut) -> Iterator[Document]:
    """The documents of a part of a source, as `documents` describes them; there may be none. `left_out` counts the others."""
    for document in _texts(source, part, tokenizer, left_out):
        characters = len(document.text)
        if document.text.isspace() or not characters:
            continue
        if source.min_characters <= characters <= (source.max_characters or characters):
            yield document
        else:
            left_out.length += 1


def _texts(source: TextSource, part: Part, tokenizer: Any, left_out: LeftOut) -> Iterator[Document]:
    if source.kind == "python-docs":
        yield from (Document(name, text) for name, text in python_documents())
        return
    row_text = RowText(source, tokenizer)
    texts = _hub_rows(source, part, row_text) if source.kind == "hub" else _file_texts(source, part, row_text)
    for name, text in texts:
        if text is None:
            left_out.missing += 1
        else:
            yield Document(name, text)


def _hub_rows(source: TextSource, part: Part, text: RowText) -> Iterator[tuple[str, str | None]]:
    for number, row in enumerate(hub.rows(source.path, source.name, source.split, part.commit, part.shard)):
        shard = f", shard {part.shard[0]}" if part.shard[1] > 1 else ""
        yield str(number), text(row, f"{source.path}{shard}, row {number} of split {source.split!r}")


def _file_texts(source: TextSource, part: Part, row_text: RowText) -> Iterator[tuple[str, str | None]]:
    fs, _ = filesystem(source.path)
    for path, name, within in part.files:
        with opened(fs, path, plain=source.kind == "parquet") as file:
            for suffix, text in READERS[source.kind](file, path, source, row_text, within):
                yield name + suffix, text
