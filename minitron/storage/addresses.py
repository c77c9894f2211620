"""Addresses of files and folders: local paths, and everything that fsspec reaches by a scheme."""

from __future__ import annotations

from pathlib import Path

import fsspec
from fsspec.core import url_to_fs

from minitron.errors import StorageError

SCHEMES = ("file", "local", "memory", "s3", "gs", "gcs", "abfs", "az", "hf")


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of `path` and the path inside it. Raises StorageError for unsupported schemes and missing drivers."""
    scheme = path.split("://", 1)[0] if "://" in path else "file"
    if scheme not in SCHEMES:
        raise StorageError(f"{path!r}: scheme {scheme!r} is not allowed", f"use one of {', '.join(SCHEMES)}")
    try:
        fs, inner = url_to_fs(path)
    except ImportError as error:
        raise StorageError(
            f"{path!r}: {error}", "install the fsspec driver it names, for example s3fs or gcsfs"
        ) from error
    return fs, inner


def is_local(path: str) -> bool:
    """Whether `path` is on this machine's own filesystem."""
    return "://" not in path or path.startswith(("file://", "local://"))


def local_path(path: str) -> Path:
    """The local path of a plain path or file:// address."""
    return Path(path.split("://", 1)[1] if "://" in path else path).expanduser().absolute()


def absolute(path: str) -> str:
    """`path` made independent of the working directory (Ray's workers change theirs)."""
    return str(local_path(path)) if is_local(path) else path.rstrip("/")


def join(path: str, *parts: str) -> str:
    """Join below a plain path or an address."""
    return "/".join([path.rstrip("/"), *parts])
