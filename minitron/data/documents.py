"""Where text comes from: Python's own documentation, text files, JSON lines, parquet, or the Hugging Face hub.

Every kind gives the same documents in the same order each time. Where it costs nothing the order is scattered (files by
the hash of their name), so that the first documents are a fair sample and a reader may stop early.
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
from typing import IO, Any, Literal, get_args

import fsspec
from fsspec.utils import glob_translate, infer_compression

from minitron.data import hub
from minitron.data.python_docs import python_documents, python_identity
from minitron.errors import InputError, StorageError
from minitron.files import file_stat, files_below
from minitron.storage import filesystem, is_local

Kind = Literal["python-docs", "text", "jsonl", "parquet", "hub"]

_SUFFIXES = {"jsonl": (".jsonl", ".json", ".ndjson"), "parquet": (".parquet",)}
_PACKED = {".zst": "zstandard", ".lz4": "lz4", ".snappy": "cramjam"}  # compressions whose fsspec driver is optional


@dataclass(frozen=True)
class TextSource:
    """A corpus.

    `path` is a file, folder or glob at any fsspec address (text, jsonl, parquet) or a dataset's name on the hub; `key`
    is the field or column that holds the text; `name`, `split` and `revision` are the hub's.
    """

    kind: Kind
    path: str = ""
    key: str = "text"
    name: str | None = None
    split: str = "train"
    revision: str | None = None


@dataclass(frozen=True)
class Document:
    """One text. `id` names it: a module, or a file (below the folder that all share) and a line or row in it."""

    id: str
    text: str


def documents(source: TextSource) -> Iterator[Document]:
    """The documents of a source, read lazily; those without any visible character are left out.

    text: one document per file. jsonl: one per line; blank lines are passed over. Both may be compressed (.gz, .bz2,
    .xz, and .zst where zstandard is installed). parquet: one per row. A folder means the files below it with the
    kind's suffix, for text all of them; hidden files are left out. Files come in the order of their names' hashes,
    lines and rows in their own. Symbolic links are followed.

    Raises InputError naming the file, line, key and value that cannot be used, or that the source holds no text.
    """
    empty = True
    for document in _reader(source):
        if document.text.strip():
            empty = False
            yield document
    if empty:
        raise InputError(f"{_label(source)}: no text in it", "check data.path and data.key")


def source_identity(source: TextSource) -> dict[str, Any]:
    """A JSON value that changes when the source's text changes, found without reading the text.

    python-docs: the interpreter and the installed versions. Files: name, size and modification time or etag; behind a
    symbolic link those of the file that it leads to, and which one that is. hub: the commit that the revision stands for
    (one request).

    Raises InputError or StorageError when the source does not exist or cannot be reached, or a link leads nowhere.
    """
    if source.kind == "python-docs":
        return {"kind": source.kind, **python_identity()}
    if source.kind == "hub":
        _need_path(source)
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
        _need_path(source)
        for number, row in enumerate(hub.rows(source.path, source.name, source.split, source.revision)):
            place = f"{source.path}, row {number} of split {source.split!r}"
            yield Document(str(number), _text(row, source.key, place))
    else:
        fs, files = _files(source)
        read = _READERS[source.kind]
        root = _common_folder(list(files))
        names = {path: path[len(root) :].lstrip("/") for path in files}
        for path in sorted(files, key=lambda path: hashlib.sha256(names[path].encode()).digest()):
            with _opened(fs, path, plain=source.kind == "parquet") as file:
                for place, text in read(file, source.key, path):
                    yield Document(names[path] + place, text)


def _whole(file: IO[bytes], key: str, path: str) -> Iterator[tuple[str, str]]:
    yield "", _decode(file.read(), path)


def _lines(file: IO[bytes], key: str, path: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file, start=1):
        place = f"{path}, line {number}"
        content = _decode(line, place)
        if not content.strip():
            continue
        try:
            value = json.loads(content)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{place}: not JSON ({error.msg} at column {error.colno}): {_short(content)}",
                "jsonl holds one whole JSON object per line; for plain text use kind: text",
            ) from error
        yield f":{number}", _text(value, key, place)


def _parquet(file: IO[bytes], key: str, path: str) -> Iterator[tuple[str, str]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file)
        if key not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise InputError(f"{path}: no column {key!r}", f"set data.key to one of its columns: {columns}")
        number = 0
        for batch in table.iter_batches(columns=[key], batch_size=1024):
            for row in batch.to_pylist():
                yield f":{number}", _text(row, key, f"{path}, row {number}")
                number += 1
    except arrow.ArrowException as error:
        raise InputError(f"{path}: not a readable parquet file ({error})", "write or download it again") from error


# kind -> (file, key, path) -> (place in the file, text)
_READERS: dict[str, Callable[[IO[bytes], str, str], Iterator[tuple[str, str]]]] = {
    "text": _whole,
    "jsonl": _lines,
    "parquet": _parquet,
}


def _text(row: Any, key: str, place: str) -> str:
    if not isinstance(row, dict):
        raise InputError(
            f"{place}: not an object but {_short(row)}", f"each one must be an object with the key {key!r}"
        )
    if key not in row:
        raise InputError(f"{place}: no key {key!r}", f"set data.key to one of its keys: {', '.join(map(str, row))}")
    text = row[key]
    if not isinstance(text, str):
        raise InputError(f"{place}: {key!r} is {_short(text)}, not a string", "set data.key to a key that holds text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: {key!r} has half a surrogate pair, {text[error.start]!r}, at character {error.start}",
            "no tokenizer takes it: take the line out or write the text as UTF-8",
        ) from error
    return text


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: not UTF-8 (byte 0x{data[error.start]:02x} at {error.start})",
            "convert it to UTF-8, or narrow data.path with a glob such as folder/*.txt",
        ) from error


def _short(value: Any) -> str:
    shown = value.strip() if isinstance(value, str) else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _label(source: TextSource) -> str:
    return f"{source.kind} {source.path}".strip()


def _need_path(source: TextSource) -> None:
    if source.kind not in get_args(Kind):
        raise InputError(f"data.kind is {source.kind!r}", f"use one of {', '.join(get_args(Kind))}")
    if not source.path:
        raise InputError(f"data.path is empty and data.kind is {source.kind!r}", "say where the text is in data.path")


def _files(source: TextSource) -> tuple[fsspec.AbstractFileSystem, dict[str, dict[str, Any]]]:
    """The source's files as {path: info}, sorted by path."""
    _need_path(source)
    fs, inner = filesystem(source.path)
    try:
        list_files = _local_files if is_local(source.path) else _remote_files
        found = list_files(fs, inner, source.kind)
    except OSError as error:
        raise StorageError(
            f"{source.path}: cannot be listed ({error})", "check the address and its permissions"
        ) from error
    if found is None:
        raise InputError(
            f"data.path: {source.path!r} does not exist", "check the path; it may be a file, folder or glob"
        )
    if not found:
        wanted = " or ".join(_SUFFIXES.get(source.kind, ("any",)))
        raise InputError(f"data.path: no files in {source.path!r}", f"{source.kind} looks for names with {wanted}")
    return fs, dict(sorted(found.items()))


def _remote_files(fs: fsspec.AbstractFileSystem, inner: str, kind: Kind) -> dict[str, dict[str, Any]] | None:
    fs.invalidate_cache()  # object stores remember listings
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
    # fsspec neither follows links to folders nor takes a link for a file
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
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        if stat := file_stat(path):
            found[path] = {"size": stat.st_size, "mtime": stat.st_mtime}
            real = os.path.realpath(path)
            if real != os.path.join(real_root, path[len(root) :].lstrip("/")):
                found[path]["target"] = real
    return found


def _is_glob(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def _belongs(relative: str, kind: Kind) -> bool:
    parts = [part for part in relative.split("/") if part]
    name = parts[-1]
    for packed in (".gz", ".bz2", ".xz", *_PACKED):
        name = name.removesuffix(packed)
    return not any(part.startswith(".") for part in parts) and name.endswith(_SUFFIXES.get(kind, ("",)))


def _common_folder(paths: list[str]) -> str:
    """The longest folder that all paths are below."""
    first, last = min(paths).split("/")[:-1], max(paths).split("/")[:-1]
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
    """A file's decompressed bytes; a file that cannot be read, or is damaged, is an error that names it."""
    suffix = "." + path.rsplit(".", 1)[-1]
    compression = None if plain else infer_compression(path)
    if compression == "zip":
        raise InputError(f"{path}: zip archives are not read", "unpack it, or compress the file with gzip")
    if compression is None and not plain and suffix in _PACKED:
        raise InputError(f"{path}: cannot read {suffix} here", f"pip install {_PACKED[suffix]}, or unpack the file")
    try:
        with fs.open(path, "rb", compression=compression) as file:
            yield file
    except PermissionError as error:
        raise StorageError(f"{path}: no permission to read it", "change its permissions, or leave it out") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise StorageError(f"{path}: cannot be read to its end ({error})", "download or compress it again") from error
