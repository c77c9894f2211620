"""Addresses of files and folders: local paths, and everything that fsspec reaches by a scheme."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
from fsspec.core import url_to_fs

from minitron.errors import StorageError
from minitron.redaction import STORAGES, Address, redact
from minitron.storage.refusals import quiet_drivers, storage_error

SCHEMES = ("file", "local", *STORAGES)
EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "az": "azure"}
"""The extra of Minitron that brings the driver of a scheme."""
REMOTE = tuple(scheme for scheme in STORAGES if scheme != "memory")  # with a bucket or repository
UNCACHED = {"use_listings_cache": False}
"""What turns off the listings that fsspec keeps of object stores: other processes change the files, and all threads of this
one share the driver."""


def check_address(path: str) -> None:
    """Raise StorageError for an address that fsspec would read as another one than is meant, that may hold a secret, or whose
    scheme is not supported."""
    scheme, separator, inner = path.partition("://")
    mistyped = next((known for known in REMOTE if path.startswith(f"{known}:")), None)
    if mistyped and not separator:
        shown = path if not set("@?") & set(path) else f"{mistyped}:…"
        corrected = f"{mistyped}://{path.removeprefix(mistyped).lstrip(':/')}"
        raise StorageError(
            f"{shown!r}: an address of {mistyped} has two slashes",
            f"write {redact(corrected)}, or ./{shown} for a folder",
        )
    if scheme in REMOTE and separator and not inner.split("/")[0]:
        raise StorageError(f"{path!r}: names no bucket", f"write {scheme}://BUCKET/FOLDER")
    if "::" in path:
        raise StorageError(
            f"{redact(path)!r}: '::' chains several addresses, which is not supported",
            "give one address, without '::' in its names",
        )
    if "\0" in path:
        raise StorageError(f"{redact(path)!r}: contains a null character", "remove it")
    address = Address.parse(path) if separator else None
    if address and scheme in STORAGES and (address.user or address.query):
        raise StorageError(
            f"{address}: has a user or parameters, which may be secrets, and addresses are shown and recorded",
            "remove them, and set the storage's own environment variables or files, such as AWS_ACCESS_KEY_ID or "
            "~/.aws/credentials",
        )
    if separator and scheme not in SCHEMES:
        raise StorageError(f"{redact(path)!r}: scheme {scheme!r} is not allowed", f"use one of {', '.join(SCHEMES)}")


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of `path` and the path inside it. Raises StorageError for missing drivers, and what `check_address`
    refuses."""
    check_address(path)
    scheme = path.split("://", 1)[0] if "://" in path else "file"
    if scheme in REMOTE:
        quiet_drivers()
    try:
        fs, inner = url_to_fs(path, **(UNCACHED if scheme in EXTRAS else {}))
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        remedy = f"pip install 'minitron[{extra}]'" if extra else "install the fsspec driver it names"
        raise StorageError(f"{path!r}: {error}", remedy) from error
    except Exception as error:  # a driver's own, for example without credentials
        raise storage_error(path, error) from error
    if type(fs) is not fsspec.get_filesystem_class(scheme):
        raise StorageError(f"{path!r}: opened as {fs.protocol}, not as {scheme}", f"use one of {', '.join(SCHEMES)}")
    return fs, inner


def is_local(path: str) -> bool:
    """Whether `path` is on this machine's own filesystem."""
    return "://" not in path or path.startswith(("file://", "local://"))


def local_path(path: str) -> Path:
    """The local path of a plain path or file:// address."""
    # not Path.expanduser, which raises RuntimeError for a user that does not exist
    return Path(os.path.expanduser(path.split("://", 1)[1] if "://" in path else path)).absolute()


def absolute(path: str) -> str:
    """`path` made independent of the working directory (Ray's workers change theirs)."""
    return str(local_path(path)) if is_local(path) else path.rstrip("/")


def join(path: str, *parts: str) -> str:
    """Join below a plain path or an address."""
    return "/".join([path.rstrip("/"), *parts])
