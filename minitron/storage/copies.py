"""Local copies of remote files, in the user's cache folder."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from minitron.cache import cache_folder
from minitron.errors import StorageError
from minitron.names import check_name, inside
from minitron.storage.addresses import filesystem, is_local, join, local_path
from minitron.storage.cache_room import locked, make_room
from minitron.storage.files import MANIFEST, read_bytes, remove, write_bytes
from minitron.storage.folders import committed_folder, is_committed, manifest
from minitron.storage.hashing import fingerprint
from minitron.storage.problems import access_errors

log = logging.getLogger(__name__)


def fetch(target: str, cache: str | None = None) -> Path:
    """A committed folder as a local path: the folder itself, or a verified copy of a remote one under `cache`.

    cache: default the user's (`minitron.cache`). Of several processes one copies and the others wait for it. File sizes of a
    copy are checked each time, SHA-256 when it is made. Before it is made, older copies are deleted as `make_room` says. Raises
    StorageError for a manifest that names files outside the folder, before anything is written.
    """
    if is_local(target):
        return local_path(target)
    expected = manifest(target)
    files = expected["files"]
    folder = Path(cache or cache_folder())
    copy = folder / fingerprint([target, expected])
    with locked(copy):
        if is_committed(str(copy)) and not _is_whole(copy, files):
            log.warning("%s: damaged copy of %s, copying it again", copy, target)
            remove(str(copy))
        if not is_committed(str(copy)):
            make_room(folder, sum(entry["bytes"] for entry in files.values()))
            _copy(target, copy, files)
        os.utime(copy / MANIFEST)  # when it was last used
    return copy


def _copy(target: str, copy: Path, files: dict[str, Any]) -> None:
    fs, inner = filesystem(target)
    with committed_folder(str(copy)) as folder:
        for name in files:
            file = inside(folder, name, join(target, MANIFEST))
            file.parent.mkdir(parents=True, exist_ok=True)
            with access_errors(join(target, name)):
                fs.get_file(f"{inner}/{name}", str(file))
    if not _same_files(manifest(str(copy))["files"], files):
        remove(str(copy))
        raise StorageError(f"{target}: the downloaded copy does not match its manifest", "run again")


def _same_files(one: dict[str, Any], other: dict[str, Any]) -> bool:
    hashes = [{name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()} for files in (one, other)]
    return hashes[0] == hashes[1]


def _is_whole(copy: Path, files: dict[str, Any]) -> bool:
    """Whether a copy has all files of a manifest with their sizes."""
    if not _same_files(manifest(str(copy))["files"], files):
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
