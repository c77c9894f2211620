"""Folders that are published atomically, on any fsspec path.

A folder is written under a temporary name on local disk, every file is hashed, and `manifest.json` (sizes and SHA-256)
is published last. A folder without its manifest does not exist for a reader; nothing ever picks "the newest directory".
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from safetensors import SafetensorError

from minitron.cache import cache_folder
from minitron.errors import MinitronError, NotWritableError, StorageError, one_line
from minitron.names import check_name, inside

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SCHEMES = ("file", "local", "memory", "s3", "gs", "gcs", "abfs", "az", "hf")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CONDITIONAL = ("s3", "gs", "gcs", "abfs", "az", "memory")  # schemes for which fsspec can create a file exclusively


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
        raise StorageError(
            f"{path}: cannot be accessed ({one_line(error)})", "check the address, its permissions and the network"
        ) from error


def exists(path: str) -> bool:
    fs, inner = filesystem(path)
    with access_errors(path):
        return bool(fs.exists(inner))


def read_bytes(path: str) -> bytes:
    fs, inner = filesystem(path)
    with access_errors(path):
        try:
            return bytes(fs.cat_file(inner))
        except FileNotFoundError as error:
            raise StorageError(f"{path}: no such file", "check the path") from error


def read_json(path: str) -> Any:
    data = read_bytes(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: not valid JSON ({error})", "delete the file and run again") from error


def write_bytes(path: str, data: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new one."""
    fs, inner = filesystem(path)
    if is_local(path):
        with _written(path, data) as temporary:
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
            # drivers retry a put whose response was lost, and the second attempt finds the file of the first
            return read_bytes(path) == data
    return True


@contextmanager
def _written(path: str, data: bytes) -> Iterator[Path]:
    """A temporary file with `data`, synced to disk in the folder of the local `path`; deleted on exit."""
    target = local_path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    with disk_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: str, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def size(path: str) -> int:
    """Bytes of all files below a folder; 0 if it does not exist."""
    fs, inner = filesystem(path)
    with access_errors(path):
        return int(fs.du(inner)) if fs.exists(inner) else 0


def names(path: str) -> list[str]:
    """Current names of the files and folders directly in a folder, sorted; empty if it does not exist."""
    fs, inner = filesystem(path)
    fs.invalidate_cache()  # fsspec caches the listings of object stores
    with access_errors(path):
        try:
            entries = fs.ls(inner, detail=False)
        except FileNotFoundError:
            return []
    return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)


def remove(path: str) -> None:
    """Delete a file or folder if it exists; a folder's manifest is deleted first, so that a partial folder is never trusted."""
    fs, inner = filesystem(path)
    with access_errors(path):
        if not fs.exists(inner):
            return
        with suppress(FileNotFoundError):  # another process was faster
            manifest = f"{inner.rstrip('/')}/{MANIFEST}"
            if fs.isdir(inner) and fs.exists(manifest):
                fs.rm_file(manifest)
            fs.rm(inner, recursive=True)


def sha256(path: str | Path) -> str:
    """SHA-256 of a local file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a JSON value in canonical form; names everything content-addressed."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


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
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise NotWritableError(
                f"{path}: cannot be written ({error.strerror})",
                "change its permissions, or choose another folder",
            ) from error
        raise


def free_bytes(path: str) -> int:
    """Free bytes on the disk that holds the nearest existing parent of a local path."""
    folder = local_path(path)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def committed_folder(target: str, note: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yield a temporary local folder; on exit without an error, publish it at `target`, its manifest last.

    note: JSON value stored in the manifest. If another process publishes `target` in the meantime, its folder is kept.
    """
    with disk_errors(target):
        temporary = staging_folder(target)
        try:
            yield temporary
            publish(temporary, target, upload(temporary, target), note)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def staging_folder(target: str) -> Path:
    """A new temporary folder whose content `publish` will commit to `target`: next to a local target, else in the system's
    temporary folder."""
    parent = local_path(target).parent if is_local(target) else Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    name = target.rstrip("/").rsplit("/", 1)[-1]
    _sweep(parent, name)
    temporary = parent / f".{name}.{_owner()}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    return temporary


def upload(temporary: Path, target: str, pattern: str = "*") -> dict[str, Any]:
    """Size and SHA-256 of the files in a staging folder that match `pattern`; copies them to `target` unless it is local.

    The files get the folder's permissions, because safetensors writes files that only their owner can read.
    """
    mode = temporary.stat().st_mode & 0o666  # as the umask sets it for new files
    for file in temporary.rglob(pattern):
        if file.is_file():
            file.chmod(mode)
    files = {
        str(file.relative_to(temporary)): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(temporary.rglob(pattern))
        if file.is_file()
    }
    if not is_local(target):
        fs, inner = filesystem(target)
        with access_errors(target):
            for name in files:
                fs.put_file(str(temporary / name), f"{inner}/{name}")
    return files


def publish(temporary: Path, target: str, files: dict[str, Any], note: dict[str, Any] | None = None) -> None:
    """Commit a staging folder whose files are uploaded, by writing the manifest."""
    manifest = json.dumps({"files": files, "note": note or {}}, indent=1, sort_keys=True) + "\n"
    if is_local(target):
        (temporary / MANIFEST).write_text(manifest)
        _publish(temporary, local_path(target))
    else:
        write_bytes(join(target, MANIFEST), manifest.encode())


def _owner() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _sweep(parent: Path, name: str) -> None:
    """Delete staging folders for the same target left by killed processes of this machine."""
    for folder in parent.glob(f".{glob.escape(name)}.*.tmp"):
        host, _, pid = folder.name.removeprefix(f".{name}.").rsplit(".", 2)[0].rpartition("-")
        if host == socket.gethostname() and pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _publish(temporary: Path, target: Path) -> None:
    if target.exists() and not (target / MANIFEST).exists():
        shutil.rmtree(target)  # a folder without a manifest was being deleted
    try:
        os.rename(temporary, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def is_committed(target: str) -> bool:
    """Whether a folder was published completely."""
    return exists(join(target, MANIFEST))


def manifest(target: str) -> dict[str, Any]:
    """The manifest of a committed folder: {"files": {name: {"bytes", "sha256"}}, "note": {...}}.

    Raises StorageError for one that names files outside the folder, or is not a manifest."""
    path = join(target, MANIFEST)
    value: dict[str, Any] = read_json(path)
    try:
        for name, entry in value["files"].items():
            if check_name(name, path) == MANIFEST or int(entry["bytes"]) < 0 or len(entry["sha256"]) != 64:
                raise ValueError(name)
        if not isinstance(value.setdefault("note", {}), dict):
            raise ValueError("note")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"{path}: not a manifest ({error!r})", f"delete {target} and run again") from error
    return value


def verify(target: str, *, hashes: bool = True) -> None:
    """Raise StorageError naming the first file that is missing, has another size, or (with `hashes`) is altered."""
    fs, inner = filesystem(target)
    for name, expected in manifest(target)["files"].items():
        path = f"{inner}/{name}"
        if not exists(join(target, name)):
            raise StorageError(f"{join(target, name)}: missing", f"delete {target} and run again")
        with access_errors(target):
            size = fs.size(path)
        if size != expected["bytes"]:
            raise StorageError(
                f"{join(target, name)}: has {size} bytes, but {expected['bytes']} were written",
                f"delete {target} and run again",
            )
        if hashes:
            with access_errors(target), fs.open(path, "rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual != expected["sha256"]:
                raise StorageError(
                    f"{join(target, name)}: SHA-256 is {actual}, expected {expected['sha256']}",
                    f"delete {target} and run again",
                )


def fetch(target: str, cache: str | None = None) -> Path:
    """A committed folder as a local path: the folder itself, or a verified copy of a remote one under `cache`.

    cache: default the user's (`minitron.cache`). File sizes of a copy are checked each time, SHA-256 when it is made. Raises
    StorageError for a manifest that names files outside the folder, before anything is written.
    """
    if is_local(target):
        return local_path(target)
    expected = manifest(target)
    copy = Path(cache or cache_folder()) / fingerprint([target, expected])
    if is_committed(str(copy)) and not _is_whole(copy, expected["files"]):
        log.warning("%s: damaged copy of %s, copying it again", copy, target)
        remove(str(copy))
    if not is_committed(str(copy)):
        fs, inner = filesystem(target)
        with committed_folder(str(copy)) as folder:
            for name in expected["files"]:
                file = inside(folder, name, join(target, MANIFEST))
                file.parent.mkdir(parents=True, exist_ok=True)
                with access_errors(join(target, name)):
                    fs.get_file(f"{inner}/{name}", str(file))
        if manifest(str(copy))["files"] != expected["files"]:
            remove(str(copy))
            raise StorageError(f"{target}: the downloaded copy does not match its manifest", "run again")
    return copy


def _is_whole(copy: Path, files: dict[str, Any]) -> bool:
    """Whether a copy has all files of a manifest with their sizes."""
    if manifest(str(copy))["files"] != files:
        return False
    return all((copy / name).is_file() and (copy / name).stat().st_size == files[name]["bytes"] for name in files)


def fetch_file(path: str, cache: str | None = None) -> Path:
    """A single file as a local path: the file itself, or a copy of a remote one under `cache`, named by its hash."""
    if is_local(path):
        return local_path(path)
    data = read_bytes(path)
    name = check_name(path.rsplit("/", 1)[-1], path)
    copy = Path(cache or cache_folder()) / hashlib.sha256(data).hexdigest()[:16] / name
    if not copy.exists() or copy.read_bytes() != data:
        write_bytes(str(copy), data)
    return copy
