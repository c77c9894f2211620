"""Files and folders at any address: read, written atomically, listed and deleted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import fsspec

from minitron.errors import MissingFileError, StorageError
from minitron.files import is_special
from minitron.storage.addresses import filesystem, is_local, local_path
from minitron.storage.private import PRIVATE, write_new
from minitron.storage.problems import access_errors, disk_errors

MANIFEST = "manifest.json"
ATTEMPTS = 3  # to delete a folder that other processes still use
CONDITIONAL = ("s3", "gs", "gcs", "abfs", "az", "memory")  # schemes for which fsspec can create a file exclusively


def _current(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """As `filesystem`, without what the driver of the model hub, which is a thread's own, has kept of earlier listings."""
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    return fs, inner


def exists(path: str) -> bool:
    fs, inner = _current(path)
    with access_errors(path):
        return bool(fs.exists(inner))


def read_bytes(path: str) -> bytes:
    data = read_bytes_if_exists(path)
    if data is None:
        raise MissingFileError(f"{path}: no such file", "check the path")
    return data


def read_bytes_if_exists(path: str) -> bytes | None:
    """The content of a file; None if it does not exist. One request to an object store either way, where `exists` takes two
    for a missing file. Raises StorageError for a folder, and for a pipe or device, which may never end."""
    fs, inner = filesystem(path)
    if is_local(path) and is_special(inner):
        raise StorageError(f"{path}: is a pipe or device, not a file", "give the path of a file")
    # otherwise newer versions of s3fs ask for the size first
    whole = {"max_concurrency": 1} if "max_concurrency" in _arguments(fs, "_cat_file") else {}
    with access_errors(path):
        try:
            return bytes(fs.cat_file(inner, **whole))
        except (FileNotFoundError, NotADirectoryError):  # also of a name below a file
            return None
        except IsADirectoryError as error:
            raise StorageError(f"{path}: is a folder, not a file", "give the path of a file") from error


def _arguments(fs: Any, method: str) -> Collection[str]:
    """The names of the arguments of a file system's method, which depend on its kind and version; none without it."""
    function = getattr(fs, method, None)
    return signature(function).parameters if function else ()


def read_json(path: str) -> Any:
    return _json(path, read_bytes(path))


def read_json_if_exists(path: str) -> Any | None:
    """As `read_json`; None if the file does not exist."""
    data = read_bytes_if_exists(path)
    return None if data is None else _json(path, data)


def _json(path: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: not valid JSON ({error})", "delete the file and run again") from error


def write_bytes(path: str, data: bytes, *, private: bool = False) -> None:
    """Write a file atomically: a reader sees the old content or the new one. A link at `path` is replaced, not followed.

    private: a local file can be read by its owner alone, whatever the umask.
    """
    fs, inner = filesystem(path)
    if is_local(path):
        with _written(path, data, PRIVATE if private else 0o666) as temporary:
            os.replace(temporary, local_path(path))
    else:
        with access_errors(path):
            fs.pipe_file(inner, data)  # a put to an object store is atomic


def create_bytes(path: str, data: bytes) -> bool:
    """Write a file unless it exists; returns whether it was written. Of several concurrent calls with different `data`, one
    succeeds.

    Object stores use a conditional put (S3: If-None-Match). Raises StorageError for a scheme without one.
    """
    if is_local(path):
        with _written(path, data) as temporary:
            try:
                os.link(temporary, local_path(path))
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise
                raise StorageError(
                    f"{path}: this file system has no hard links, which are needed to create a file only if it does not exist",
                    "keep runs on another file system, or in an object store",
                ) from error
        return True
    fs, inner = filesystem(path)
    if path.split("://", 1)[0] not in CONDITIONAL:
        raise StorageError(
            f"{path}: this kind of storage cannot create a file only if it does not exist",
            f"keep runs on a local folder or at one of {', '.join(f'{scheme}://' for scheme in CONDITIONAL)}",
        )
    with access_errors(path):
        try:
            fs.pipe_file(inner, data, mode="create")
        except FileExistsError:
            # drivers retry a put whose response was lost, and the second attempt finds the file of the first; another
            # process may have removed the file meanwhile
            return read_bytes_if_exists(path) == data
    return True


@contextmanager
def _written(path: str, data: bytes, mode: int = 0o666) -> Iterator[Path]:
    """A temporary file with `data`, synced to disk in the folder of the local `path`; deleted on exit."""
    target = local_path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    with disk_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_new(temporary, data, mode)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: str, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def size(path: str) -> int:
    """Bytes of all files below a folder, or of a file; 0 if it does not exist."""
    return sum(int(entry["size"]) for _, entry in _listed(path))


def names(path: str) -> list[str]:
    """Current names of the files and folders directly in a folder, sorted; empty if it does not exist."""
    fs, inner = _current(path)
    with access_errors(path):
        try:
            entries = fs.ls(inner, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)


def entries(path: str) -> dict[str, bool]:
    """Whether each file or folder directly in a folder is a folder, by name, from one listing; empty if it does not exist."""
    fs, inner = _current(path)
    with access_errors(path):
        try:
            listed = fs.ls(inner, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
    found = {str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]: entry["type"] == "directory" for entry in listed}
    return {} if list(found.values()) == [False] and fs.isfile(inner) else found  # some list a file as itself


@dataclass(frozen=True)
class ListedFile:
    """A file as a storage lists it."""

    size: int
    """Bytes."""
    version: str
    """What changes with the content: an object store's ETag, otherwise the time of the last writing; empty if none is known."""


VERSIONS = ("ETag", "etag", "blob_id", "LastModified", "last_modified", "updated", "mtime", "created")


def listed_files(path: str) -> dict[str, ListedFile]:
    """Current size and version of all files below a folder, by their names relative to it, or of the file `path` under an
    empty name, from one listing; empty if there is none."""
    return {
        name: ListedFile(int(entry["size"]), next((str(entry[k]) for k in VERSIONS if entry.get(k)), ""))
        for name, entry in _listed(path)
    }


def file_sizes(path: str) -> dict[str, int]:
    """Current sizes in bytes of all files below a folder, by their names relative to it, from one listing; empty if it does
    not exist."""
    return {name: int(entry["size"]) for name, entry in _listed(path) if name}


def _listed(path: str) -> list[tuple[str, dict[str, Any]]]:
    """What fsspec's `find` says of each file below a folder, by its name relative to it; of the file `path` under an empty
    one."""
    fs, inner = _current(path)
    root = str(fs._strip_protocol(inner)).rstrip("/")
    with access_errors(path):
        listed = fs.find(inner, detail=True)
    return [
        (name[len(root) + 1 :], entry) for name, entry in listed.items() if name == root or name.startswith(f"{root}/")
    ]


def remove(path: str) -> None:
    """Delete a file or folder if it exists, of a link the link alone. A partly deleted folder is never trusted: a local one is
    renamed first, of another the manifest is deleted first."""
    if is_local(path):
        with access_errors(path), suppress(FileNotFoundError):  # there is none, or another process was faster
            _remove_local(local_path(path))
        return
    fs, inner = filesystem(path)
    with access_errors(path):
        if not fs.exists(inner):
            return
        with suppress(FileNotFoundError):  # another process was faster
            manifest = f"{inner.rstrip('/')}/{MANIFEST}"
            if fs.isdir(inner) and fs.exists(manifest):
                fs.rm_file(manifest)
            fs.rm(inner, recursive=True)


def _remove_local(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        try:
            path.unlink()
            return
        except OSError:
            if path.is_symlink() or not path.is_dir():  # otherwise another process has made the folder meanwhile
                raise
    doomed = temporary_name(path)  # what a killed process leaves of it is deleted with its staging folders
    os.rename(path, doomed)
    for _ in range(ATTEMPTS):
        try:
            shutil.rmtree(doomed)
            return
        except OSError as error:
            # another process was writing a file there when the folder was renamed; or NFS keeps one that is still open
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def temporary_name(target: Path) -> Path:
    """A new name beside `target` that contains this machine and process, by which later ones know that it can be deleted."""
    return target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
