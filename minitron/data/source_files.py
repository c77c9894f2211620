"""The files of a text source: listing, order, and an identity that changes with them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from typing import Any

import fsspec
from fsspec.utils import glob_translate

from minitron.arguments import check_type
from minitron.data import hub
from minitron.data.compression import SUFFIXES as COMPRESSIONS
from minitron.data.python_docs import python_identity
from minitron.data.sources import Kind, TextSource
from minitron.errors import InputError, StorageError
from minitron.files import file_stat, files_below
from minitron.storage import access_errors, filesystem, is_local

_SUFFIXES = {"jsonl": (".jsonl", ".json", ".ndjson"), "csv": (".csv", ".tsv"), "parquet": (".parquet",)}


def source_identity(source: TextSource) -> dict[str, Any]:
    """A JSON value that changes when the source's text changes, computed without reading the text.

    python-docs: the interpreter and the installed versions. Files: name, size and modification time or etag; for a
    symbolic link those of its target, and the target's path. hub: the commit that the revision resolves to (one request).

    Raises InputError or StorageError if the source does not exist or cannot be reached, or for a dangling link.
    """
    check_type("source", source, TextSource)
    options = source.options()
    if source.kind == "python-docs":
        return {"kind": source.kind, **options, **python_identity()}
    if source.kind == "hub":
        check_path(source)
        commit = hub.commit(source.path, source.revision)
        fields = {"path": source.path, "name": source.name, "split": source.split, "commit": commit}
        return {"kind": source.kind, "key": source.key, **options, **fields}
    fs, files = source_files(source)
    versions = sorted([path, info["size"], _version(fs, path, info)] for path, info in files.items())
    return {"kind": source.kind, "key": source.key, **options, "files": versions}


def check_path(source: TextSource) -> None:
    """Raise InputError for a source without a path."""
    if not source.path:
        raise InputError(f"path: empty, with kind {source.kind!r}", "set path to the address of the text")


def source_files(source: TextSource) -> tuple[fsspec.AbstractFileSystem, dict[str, dict[str, Any]]]:
    """The file system of a source of files, and its files as {path: info}, sorted by path.

    Raises InputError if there are none, StorageError if they cannot be listed.
    """
    check_path(source)
    fs, inner = filesystem(source.path)
    list_files: Callable[..., dict[str, dict[str, Any]] | None] = (
        _local_files if is_local(source.path) else _remote_files
    )
    try:
        with access_errors(source.path):
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


def reading_order(paths: list[str]) -> list[tuple[str, str]]:
    """(path, name relative to the common folder) in the order of the names' hashes, so that the first files are a fair
    sample."""
    root = _common_folder(paths)
    names = {path: path[len(root) :].lstrip("/") for path in paths}
    ordered = sorted(paths, key=lambda path: hashlib.sha256(names[path].encode()).digest())
    return [(path, names[path]) for path in ordered]


def _remote_files(fs: fsspec.AbstractFileSystem, inner: str, kind: Kind) -> dict[str, dict[str, Any]] | None:
    fs.invalidate_cache()  # the hub's driver keeps its listings
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
    for suffix in COMPRESSIONS:
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
