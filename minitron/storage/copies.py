"""Local copies of remote files, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from minitron.cache import cache_folder
from minitron.errors import StorageError
from minitron.names import check_name, inside
from minitron.storage.addresses import filesystem, is_local, join, local_path
from minitron.storage.cache_room import locked, make_room
from minitron.storage.files import MANIFEST, ListedFile, listed_files, read_bytes, read_json, remove, write_bytes
from minitron.storage.folders import committed_folder, is_committed, manifest
from minitron.storage.hashing import fingerprint, sha256
from minitron.storage.problems import access_errors, missing_errors

WEIGHTS = (".safetensors", ".bin")  # ends of the names of files with weights
BEING_WRITTEN = "it is being written: run again"

log = logging.getLogger(__name__)


def fetch(target: str, cache: str | None = None, *, weights: bool = True) -> Path:
    """A committed folder as a local path: the folder itself, or a verified copy of a remote one under `cache`.

    cache: by default the user's folder (`minitron.cache`). weights: whether a copy has files of weights too; a tokenizer needs
    none. Of several processes one copies and the others wait for it. SHA-256 is checked when a copy is made, and again for a
    file that has changed since it was checked (see `_is_whole`); a damaged copy is made again. Before a copy is made, older
    ones are deleted as `make_room` says. Raises StorageError for a manifest that names files outside the folder, before
    anything is written.
    """
    if is_local(target):
        return local_path(target)
    expected = manifest(target)
    files = expected["files"]
    if not weights:
        files = {name: entry for name, entry in files.items() if not name.endswith(WEIGHTS)}
    key = [target, expected, *([] if weights else ["without files of weights"])]
    size = sum(entry["bytes"] for entry in files.values())
    return _cached(target, key, cache, size, partial(_copy, target, files), files)


def _copy(target: str, files: dict[str, Any], copy: Path) -> None:
    with committed_folder(str(copy)) as folder:
        _download(target, folder, files, f"delete {target} and run again")
    if not _same_files(manifest(str(copy))["files"], files):
        remove(str(copy))
        raise StorageError(f"{target}: the downloaded copy does not match its manifest", "run again")


def fetch_listed(target: str, files: Mapping[str, ListedFile]) -> Path:
    """A local copy of files of a remote folder that nothing verifies, such as one that other programs wrote; `files` are those
    that the storage lists, by name. With another size or version of one they are copied again.

    Raises StorageError for names that lead out of the folder, before anything is written, and for a file that changes
    meanwhile.
    """
    for name in files:
        check_name(name, target)
    key = [target, {name: [file.size, file.version] for name, file in files.items()}]
    return _cached(target, key, None, sum(file.size for file in files.values()), partial(_copy_listed, target, files))


def _copy_listed(target: str, files: Mapping[str, ListedFile], copy: Path) -> None:
    with committed_folder(str(copy)) as made:
        _download(target, made, files, BEING_WRITTEN)
        now = _listed_now(target, files)
        for name, listed in files.items():
            size = (made / name).stat().st_size
            if size != listed.size or now.get(name) != listed:
                problem = f"{target}/{name}: has {size:,} bytes, and was listed with {listed.size:,}"
                if size == listed.size:
                    problem = f"{target}/{name}: was replaced while it was copied"
                raise StorageError(problem, BEING_WRITTEN)


def _listed_now(target: str, files: Mapping[str, ListedFile]) -> dict[str, ListedFile]:
    if len(files) > 1:
        return listed_files(target)
    [name] = files  # there may be many others beside it
    found = listed_files(join(target, name))
    return {name: found[""]} if "" in found else {}


def _cached(
    target: str,
    key: list[Any],
    cache: str | None,
    size: int,
    make: Callable[[Path], None],
    files: dict[str, Any] | None = None,
) -> Path:
    """The copy of `target` with this key in the user's cache; if it is not there, or damaged, `make` makes it. size: in bytes.
    files: of the manifest that it must have, None for that of the copy."""
    folder = Path(cache or cache_folder())
    copy = folder / fingerprint(key)

    def expected() -> dict[str, Any]:
        whole: dict[str, Any] = manifest(str(copy))["files"] if files is None else files
        return whole

    with locked(copy):
        if is_committed(str(copy)) and not _is_whole(copy, expected):
            log.warning("%s: damaged copy of %s, copying it again", copy, target)
            remove(str(copy))
        if not is_committed(str(copy)):
            make_room(folder, size)
            make(copy)
            _note_checked(copy, _states(copy, expected()))
        os.utime(copy / MANIFEST)  # when it was last used
    return copy


def _download(target: str, folder: Path, names: Iterable[str], remedy: str) -> None:
    """Copy files of a remote folder to a new local one. remedy: if one is missing."""
    fs, inner = filesystem(target)
    for name in names:
        file = inside(folder, name, join(target, MANIFEST))
        file.parent.mkdir(parents=True, exist_ok=True)
        path = join(target, name)
        with access_errors(path), missing_errors(path, remedy):
            fs.get_file(f"{inner}/{name}", str(file))


def _same_files(one: dict[str, Any], other: dict[str, Any]) -> bool:
    hashes = [{name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()} for files in (one, other)]
    return hashes[0] == hashes[1]


def _is_whole(copy: Path, expected: Callable[[], dict[str, Any]]) -> bool:
    """Whether a copy has a manifest, the content of all files that are `expected`, and all are this user's own.

    The operating system's numbers for each file (size, inode, times of the last writing and change) are noted beside
    the copy when its SHA-256 is checked. Only files with other numbers are hashed again. No program can set the last of them.
    """
    try:
        files = expected()
        if not _same_files(manifest(str(copy))["files"], files):
            return False
    except StorageError:  # the machine has stopped before the manifest was on its disk
        return False
    states = _states(copy, files)
    if any(states.get(name, [None])[0] != entry["bytes"] for name, entry in files.items()):
        return False
    known = _checked(copy)
    if any(sha256(copy / name) != files[name]["sha256"] for name, state in states.items() if known.get(name) != state):
        return False
    if known != states:
        _note_checked(copy, states)
    return True


def _states(copy: Path, files: dict[str, Any]) -> dict[str, list[int]]:
    """[size, inode, time of last writing, of last change] of each regular file of this user; others are left out."""
    states = {}
    for name in files:
        with suppress(OSError, StorageError):  # missing, or a link that leads out of the copy
            status = inside(copy, name, str(copy)).lstat()
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid():
                states[name] = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    return states


def _checked_path(copy: Path) -> str:
    return str(copy.with_name(f".{copy.name}.checked.json"))


def _checked(copy: Path) -> dict[str, Any]:
    """The states of a copy's files when their SHA-256 was checked; empty if it was not, or if nobody knows."""
    path = _checked_path(copy)
    with suppress(StorageError):  # an earlier version's copy, or a damaged note: everything is hashed
        value = read_json(path)
        if isinstance(value, dict) and os.lstat(path).st_uid == os.getuid():
            return value
    return {}


def _note_checked(copy: Path, states: dict[str, list[int]]) -> None:
    write_bytes(_checked_path(copy), json.dumps(states).encode(), private=True)


def fetch_file(path: str) -> Path:
    """A single file as a local path: the file itself, or a copy of a remote one in the user's cache, named by its hash."""
    if is_local(path):
        return local_path(path)
    data = read_bytes(path)
    name = check_name(path.rsplit("/", 1)[-1], path)
    copy = Path(cache_folder()) / hashlib.sha256(data).hexdigest()[:16] / name
    if not copy.exists() or copy.read_bytes() != data:
        write_bytes(str(copy), data)
    return copy
