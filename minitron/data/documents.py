"""Text sources: Python's own documentation, text files, JSON lines, parquet, or the Hugging Face hub.

Every kind yields the same documents in the same order each time. Files are visited in the order of their names' hashes, so
that the first documents are a fair sample and a reader may stop early.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Literal

import fsspec
from fsspec.utils import glob_translate, infer_compression

from minitron.arguments import check_fields, check_type
from minitron.data import hub
from minitron.data.python_docs import python_documents, python_identity
from minitron.errors import InputError, StorageError
from minitron.files import file_stat, files_below
from minitron.storage import filesystem, is_local

Kind = Literal["python-docs", "text", "jsonl", "parquet", "hub"]

_SUFFIXES = {"jsonl": (".jsonl", ".json", ".ndjson"), "parquet": (".parquet",)}
_OPTIONAL_COMPRESSIONS = {
    ".zst": "zstandard",
    ".lz4": "lz4",
    ".snappy": "cramjam",
}  # suffix: package of fsspec's driver


@dataclass(frozen=True)
class TextSource:
    """A corpus.

    kind: "python-docs", "text", "jsonl", "parquet" or "hub". path: a file, folder or glob at any fsspec address (text,
    jsonl, parquet), or the name of a dataset on the hub; unused for python-docs. key: the field or column with the text.
    name, split, revision: configuration, split and revision of a dataset on the hub. Raises InputError for a wrong type.
    """

    kind: Kind
    path: str = ""
    key: str = "text"
    name: str | None = None
    split: str = "train"
    revision: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Document:
    """One text. `id` is a module's name, or a file's path (relative to the common folder) with a line or row number."""

    id: str
    text: str


def documents(source: TextSource) -> Iterator[Document]:
    """Read the documents of a source lazily; documents that are only whitespace are left out.

    text: one document per file. jsonl: one per line; blank lines are skipped. Both may be compressed (.gz, .bz2, .xz, and
    .zst if zstandard is installed). parquet: one per row. A folder stands for the files below it with the kind's suffix,
    for text all files; hidden files are left out. Files are read in the order of their names' hashes, lines and rows in
    file order. Symbolic links are followed.

    Raises InputError naming the file, line, key and value that cannot be used, or if the source contains no text; StorageError
    for a file that cannot be read.
    """
    check_type("source", source, TextSource)
    empty = True
    for document in _reader(source):
        if document.text.strip():
            empty = False
            yield document
    if empty:
        raise InputError(f"{_label(source)}: it contains no text", "check path and key")


def source_identity(source: TextSource) -> dict[str, Any]:
    """A JSON value that changes when the source's text changes, computed without reading the text.

    python-docs: the interpreter and the installed versions. Files: name, size and modification time or etag; for a
    symbolic link those of its target, and the target's path. hub: the commit that the revision resolves to (one request).

    Raises InputError or StorageError if the source does not exist or cannot be reached, or for a dangling link.
    """
    check_type("source", source, TextSource)
    if source.kind == "python-docs":
        return {"kind": source.kind, **python_identity()}
    if source.kind == "hub":
        _check_path(source)
        commit = hub.commit(source.path, source.revision)
        fields = {"path": source.path, "name": source.name, "split": source.split, "commit": commit}
        return {"kind": source.kind, "key": source.key, **fields}
    fs, files = _files(source)
    versions = sorted([path, info["size"], _version(fs, path, info)] for path, info in files.items())
    return {"kind": source.kind, "key": source.key, "files": versions}


def _reader(source: TextSource) -> Iterator[Document]:
    if source.kind == "python-docs":
        yield from (Document(name, text) for name, text in python_documents())
    elif source.kind == "hub":
        _check_path(source)
        for number, row in enumerate(hub.rows(source.path, source.name, source.split, source.revision)):
            location = f"{source.path}, row {number} of split {source.split!r}"
            yield Document(str(number), _text(row, source.key, location))
    else:
        fs, files = _files(source)
        read = _READERS[source.kind]
        root = _common_folder(list(files))
        names = {path: path[len(root) :].lstrip("/") for path in files}
        for path in sorted(files, key=lambda path: hashlib.sha256(names[path].encode()).digest()):
            with _opened(fs, path, plain=source.kind == "parquet") as file:
                for suffix, text in read(file, source.key, path):
                    yield Document(names[path] + suffix, text)


def _whole(file: IO[bytes], key: str, path: str) -> Iterator[tuple[str, str]]:
    yield "", _decode(file.read(), path)


def _lines(file: IO[bytes], key: str, path: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file, start=1):
        location = f"{path}, line {number}"
        content = _decode(line, location)
        if not content.strip():
            continue
        try:
            value = json.loads(content)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{location}: not JSON ({error.msg} at column {error.colno}): {_short(content)}",
                "write one JSON object per line; for plain text use kind: text",
            ) from error
        yield f":{number}", _text(value, key, location)


def _parquet(file: IO[bytes], key: str, path: str) -> Iterator[tuple[str, str]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file)
        if key not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise InputError(f"{path}: no column {key!r}", f"set key to one of its columns: {columns}")
        number = 0
        for batch in table.iter_batches(columns=[key], batch_size=1024):
            for row in batch.to_pylist():
                yield f":{number}", _text(row, key, f"{path}, row {number}")
                number += 1
    except arrow.ArrowException as error:
        raise InputError(f"{path}: not a readable parquet file ({error})", "write or download it again") from error


# kind -> (file, key, path) -> (suffix of the document's id, text)
_READERS: dict[str, Callable[[IO[bytes], str, str], Iterator[tuple[str, str]]]] = {
    "text": _whole,
    "jsonl": _lines,
    "parquet": _parquet,
}


def _text(row: Any, key: str, location: str) -> str:
    if not isinstance(row, dict):
        raise InputError(
            f"{location}: {_short(row)} is not an object", f"each document must be an object with the key {key!r}"
        )
    if key not in row:
        raise InputError(f"{location}: no key {key!r}", f"set key to one of its keys: {', '.join(map(str, row))}")
    text = row[key]
    if not isinstance(text, str):
        raise InputError(
            f"{location}: {key!r} is {_short(text)}, not a string", "set key to a field that contains text"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{location}: {key!r} has half a surrogate pair, {text[error.start]!r}, at character {error.start}",
            "tokenizers do not accept it: remove the line or write the text as UTF-8",
        ) from error
    return text


def _decode(data: bytes, location: str) -> str:
    try:
        return data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{location}: not UTF-8 (byte 0x{data[error.start]:02x} at {error.start})",
            "convert it to UTF-8, or narrow path with a glob such as folder/*.txt",
        ) from error


def _short(value: Any) -> str:
    shown = value.strip() if isinstance(value, str) else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _label(source: TextSource) -> str:
    return f"{source.kind} {source.path}".strip()


def _check_path(source: TextSource) -> None:
    if not source.path:
        raise InputError(f"path: empty, with kind {source.kind!r}", "set path to the address of the text")


def _files(source: TextSource) -> tuple[fsspec.AbstractFileSystem, dict[str, dict[str, Any]]]:
    """The source's files as {path: info}, sorted by path."""
    _check_path(source)
    fs, inner = filesystem(source.path)
    try:
        list_files = _local_files if is_local(source.path) else _remote_files
        files = list_files(fs, inner, source.kind)
    except OSError as error:
        raise StorageError(
            f"{source.path}: cannot be listed ({error})", "check the address and its permissions"
        ) from error
    if files is None:
        raise InputError(f"path: {source.path!r} does not exist", "give an existing file, folder or glob")
    if not files:
        suffixes = " or ".join(_SUFFIXES.get(source.kind, ("any",)))
        raise InputError(f"path: no files in {source.path!r}", f"{source.kind} reads files with the suffix {suffixes}")
    return fs, dict(sorted(files.items()))


def _remote_files(fs: fsspec.AbstractFileSystem, inner: str, kind: Kind) -> dict[str, dict[str, Any]] | None:
    fs.invalidate_cache()  # fsspec caches the listings of object stores
    if fs.isfile(inner):
        return {inner: fs.info(inner)}
    if fs.isdir(inner):
        root = inner.rstrip("/")
        listed = fs.find(inner, detail=True).items()
        return {path: info for path, info in listed if _belongs(path[len(root) :], kind)}
    if _is_glob(inner):
        return {path: info for path, info in fs.glob(inner, detail=True).items() if info["type"] == "file"}
    return None


def _local_files(_: fsspec.AbstractFileSystem, inner: str, kind: Kind) -> dict[str, dict[str, Any]] | None:
    # fsspec does not follow links to folders, and does not treat a link as a file
    if os.path.isdir(inner):
        root = inner.rstrip("/")
        paths = [path for path in files_below(inner) if _belongs(path[len(root) :], kind)]
    elif os.path.lexists(inner):
        root = os.path.dirname(inner)
        paths = [inner]
    elif _is_glob(inner):
        root = re.split(r"[*?[]", inner, maxsplit=1)[0].rpartition("/")[0]
        depth = None if "**" in inner else inner[len(root) + 1 :].count("/") + 1
        matches = re.compile(glob_translate(inner)).match
        paths = (
            [path for path in files_below(root or "/", depth) if matches(path)] if os.path.isdir(root or "/") else []
        )
    else:
        return None
    real_root = os.path.realpath(root or "/")
    files: dict[str, dict[str, Any]] = {}
    for path in paths:
        if stat := file_stat(path):
            files[path] = {"size": stat.st_size, "mtime": stat.st_mtime}
            real = os.path.realpath(path)
            if real != os.path.join(real_root, path[len(root) :].lstrip("/")):
                files[path]["target"] = real
    return files


def _is_glob(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def _belongs(relative: str, kind: Kind) -> bool:
    parts = [part for part in relative.split("/") if part]
    name = parts[-1]
    for suffix in (".gz", ".bz2", ".xz", *_OPTIONAL_COMPRESSIONS):
        name = name.removesuffix(suffix)
    return not any(part.startswith(".") for part in parts) and name.endswith(_SUFFIXES.get(kind, ("",)))


def _common_folder(paths: list[str]) -> str:
    """The deepest folder that contains all paths."""
    first = min(paths).split("/")[:-1]
    last = max(paths).split("/")[:-1]
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return "/".join(first[:shared])


def _version(fs: fsspec.AbstractFileSystem, path: str, info: dict[str, Any]) -> str:
    for field in ("ETag", "etag", "blob_id", "md5Hash", "mtime", "LastModified", "last_modified"):
        if info.get(field) is not None:
            return f"{info[field]} {info['target']}" if "target" in info else str(info[field])
    return str(fs.ukey(path))


@contextmanager
def _opened(fs: fsspec.AbstractFileSystem, path: str, *, plain: bool) -> Iterator[IO[bytes]]:
    """A file's decompressed bytes. Raises StorageError naming a file that cannot be read or is damaged."""
    suffix = "." + path.rsplit(".", 1)[-1]
    compression = None if plain else infer_compression(path)
    if compression == "zip":
        raise InputError(f"{path}: zip archives are not supported", "unpack it, or compress the file with gzip")
    if compression is None and not plain and suffix in _OPTIONAL_COMPRESSIONS:
        package = _OPTIONAL_COMPRESSIONS[suffix]
        raise InputError(f"{path}: cannot read {suffix} here", f"pip install {package}, or unpack the file")
    try:
        with fs.open(path, "rb", compression=compression) as file:
            yield file
    except PermissionError as error:
        raise StorageError(f"{path}: no permission to read it", "change its permissions, or leave it out") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise StorageError(f"{path}: cannot be read completely ({error})", "download or compress it again") from error
