"""What a disk, a server or a driver refuses, as StorageError with a remedy."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from minitron.errors import MinitronError, NotWritableError, StorageError
from minitron.storage.addresses import is_local, local_path
from minitron.storage.refusals import storage_error

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# a parent is a file, the path is a folder, a parent is in /proc or on a share that is gone, a name is too long
IMPOSSIBLE = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP)


@contextmanager
def access_errors(path: str) -> Iterator[None]:
    """Turn errors of access into StorageError: missing permission, and any exception of a remote storage's driver, which has
    its own types for a server that does not answer."""
    try:
        yield
    except MinitronError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in FULL  # the local disk, to which a copy is written
        if full or (is_local(path) and not isinstance(error, PermissionError)):
            raise
        raise storage_error(path, error) from error


@contextmanager
def missing_errors(path: str, remedy: str) -> Iterator[None]:
    """Turn the error that a file is not there into a StorageError that says so, for a file that must be there: elsewhere in an
    object store it means that there is no bucket."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"{path}: missing", remedy) from error


@contextmanager
def disk_errors(path: str) -> Iterator[None]:
    """Turn errors of the operating system (disk full, no permission) into NotWritableError with a remedy."""
    try:
        yield
    except SafetensorError as error:
        if "os error" not in str(error):
            raise
        raise NotWritableError(f"{path}: {error}", "free some space, or choose another folder") from error
    except OSError as error:
        if error.errno in FULL:
            free = free_bytes(path)
            raise NotWritableError(
                f"{path}: the disk is full ({free / 1e9:.2f} GB free)",
                "free some space, or choose another folder",
            ) from error
        if error.errno in FORBIDDEN:
            remedy = "change its permissions, or choose another folder"
        elif error.errno in IMPOSSIBLE:
            remedy = "choose another folder"
        else:
            raise
        raise NotWritableError(f"{path}: cannot be written ({error.strerror})", remedy) from error


def free_bytes(path: str) -> int:
    """Free bytes on the disk that holds the nearest existing parent of a local path."""
    return shutil.disk_usage(nearest_parent(local_path(path))).free


def nearest_parent(folder: Path) -> Path:
    """The folder itself if it exists, otherwise the nearest of its parents that does."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
