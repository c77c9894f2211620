"""Folders that are published atomically.

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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minitron.errors import StorageError
from minitron.names import check_name
from minitron.storage.addresses import filesystem, is_local, join, local_path
from minitron.storage.files import (
    CONDITIONAL,
    MANIFEST,
    create_bytes,
    exists,
    file_sizes,
    read_json,
    remove,
    temporary_name,
    write_bytes,
)
from minitron.storage.hashing import sha256
from minitron.storage.problems import access_errors, disk_errors, missing_errors
from minitron.storage.ranges import check_entry

log = logging.getLogger(__name__)


@contextmanager
def committed_folder(
    target: str,
    note: dict[str, Any] | None = None,
    *,
    new: bool = False,
    before_commit: Callable[[], None] = lambda: None,
    known: Mapping[str, dict[str, Any]] | None = None,
) -> Iterator[Path]:
    """Yield a temporary local folder; on exit without an error, publish it at `target`, its manifest last.

    note: JSON value stored in the manifest. before_commit: called before anything is written at `target`; it may raise a
    MinitronError to prevent that. If another process publishes `target` in the meantime, its folder is kept; with `new` that
    is a StorageError, for a name that the user has chosen, where another result may be in it. In an object store, of two that
    copy their files there at the same time, the last one's are kept. known: as for `upload`; the block may add to it. Raises
    StorageError for a local folder that is there already, is not empty and has no manifest: nobody knows whose it is.
    """
    with disk_errors(target):
        if is_local(target) and _is_foreign(local_path(target)):
            raise StorageError(
                f"{target}: exists, but has no {MANIFEST}: it is not a folder that was written completely",
                "delete it if it is of no use, or give another folder",
            )
        temporary = staging_folder(target)
        try:
            yield temporary
            before_commit()
            if not is_local(target) and is_committed(target):
                if new:
                    raise StorageError(f"{target}: someone else has made this folder meanwhile", "give another folder")
                return
            publish(temporary, target, upload(temporary, target, known=known), note, new=new)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def staging_folder(target: str) -> Path:
    """A new temporary folder whose content `publish` will commit to `target`: next to a local target, else in the system's
    temporary folder, where only its owner may look into it."""
    local = is_local(target)
    parent = local_path(target).parent if local else Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    name = target.rstrip("/").rsplit("/", 1)[-1]
    sweep(parent, name)
    temporary = temporary_name(parent / name)
    temporary.mkdir(mode=0o777 if local else 0o700)
    return temporary


def upload(
    temporary: Path, target: str, pattern: str = "*", known: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The manifest's entries of the files in a staging folder that match `pattern`; copies them to `target` unless it is local.

    known: entries of files that were hashed while they were written. The files get the folder's permissions, because
    safetensors writes files that only their owner can read.
    """
    known = known or {}
    mode = temporary.stat().st_mode & 0o666  # as the umask sets it for new files
    entries: dict[str, Any] = {}
    for file in sorted(temporary.rglob(pattern)):
        if file.is_file():
            file.chmod(mode)
            name = str(file.relative_to(temporary))
            entries[name] = known.get(name) or {"bytes": file.stat().st_size, "sha256": sha256(file)}
    if not is_local(target):
        _put(temporary, target, entries)
    return entries


def _put(temporary: Path, target: str, names: Iterable[str]) -> None:
    fs, inner = filesystem(target)
    with access_errors(target):
        for name in names:
            fs.put_file(str(temporary / name), f"{inner}/{name}")


def publish(
    temporary: Path, target: str, files: dict[str, Any], note: dict[str, Any] | None = None, *, new: bool = False
) -> None:
    """Commit a staging folder whose files are uploaded, by writing the manifest. new: as in `committed_folder`."""
    manifest = json.dumps({"files": files, "note": note or {}}, indent=1, sort_keys=True) + "\n"
    if is_local(target):
        (temporary / MANIFEST).write_text(manifest)
        _publish(temporary, local_path(target), new)
    else:
        _publish_remote(temporary, target, files, manifest.encode())


def _publish_remote(temporary: Path, target: str, files: Collection[str], manifest: bytes) -> None:
    path = join(target, MANIFEST)
    if path.split("://", 1)[0] not in CONDITIONAL:
        write_bytes(path, manifest)
        return
    while not create_bytes(path, manifest):
        # the files of the two may be mixed now, and the other process writes no more
        log.warning("%s: another process has written this folder at the same time; its files are replaced", target)
        remove(path)
        _put(temporary, target, [name for name in files if (temporary / name).is_file()])


def sweep(parent: Path, name: str) -> None:
    """Delete staging folders for the target `name` in a local folder, left by killed processes of this user on this machine."""
    for folder in parent.glob(f".{glob.escape(name)}.*.tmp"):
        host, _, pid = folder.name.removeprefix(f".{name}.").rsplit(".", 2)[0].rpartition("-")
        if host != socket.gethostname() or not pid.isdigit() or _is_alive(int(pid)):
            continue
        with suppress(FileNotFoundError):
            if folder.lstat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _publish(temporary: Path, target: Path, new: bool) -> None:
    while True:
        try:
            os.rename(temporary, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if new or _is_foreign(target):
                kept = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}")
                os.rename(temporary, kept)
                raise StorageError(
                    f"{target}: someone else has made this folder meanwhile; the result is in {kept}",
                    f"delete {target} or move it, and run again",
                ) from error
        if (target / MANIFEST).exists():
            return
        # it was in the way, and another process has deleted it meanwhile


def _is_foreign(target: Path) -> bool:
    """Whether a local folder has files, but no manifest."""
    try:
        names = os.listdir(target)  # one look: another process may delete the folder or make it meanwhile
    except (FileNotFoundError, NotADirectoryError):
        return False
    return bool(names) and MANIFEST not in names


def is_committed(target: str) -> bool:
    """Whether a folder was published completely."""
    return exists(join(target, MANIFEST))


def manifest(target: str) -> dict[str, Any]:
    """The manifest of a committed folder: {"files": {name: {"bytes", "sha256"}}, "note": {...}}. Files that are read in
    parts have "parts" as well (see `minitron.storage.ranges`).

    Raises StorageError for one that names files outside the folder, or is not a manifest."""
    path = join(target, MANIFEST)
    value: dict[str, Any] = read_json(path)
    try:
        for name, entry in value["files"].items():
            if check_name(name, path) == MANIFEST:
                raise ValueError(name)
            check_entry(entry)
        if not isinstance(value.setdefault("note", {}), dict):
            raise ValueError("note")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"{path}: not a manifest ({error!r})", f"delete {target} and run again") from error
    return value


def verify(target: str, *, hashes: bool = True, only: Collection[str] | None = None) -> None:
    """Raise StorageError naming the first file that is missing, has another size, or (with `hashes`) is altered.

    only: names of the files to look at, by default all.
    """
    fs, inner = filesystem(target)
    remedy = f"delete {target} and run again"
    sizes = file_sizes(target)
    for name, expected in manifest(target)["files"].items():
        if only is not None and name not in only:
            continue
        path = join(target, name)
        if name not in sizes:
            raise StorageError(f"{path}: missing", remedy)
        if sizes[name] != expected["bytes"]:
            raise StorageError(f"{path}: has {sizes[name]} bytes, but {expected['bytes']} were written", remedy)
        if hashes:
            with access_errors(path), missing_errors(path, remedy), fs.open(f"{inner}/{name}", "rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual != expected["sha256"]:
                raise StorageError(f"{path}: SHA-256 is {actual}, expected {expected['sha256']}", remedy)
