"""Listing the files of a local folder; symbolic links, which the hub's cache consists of, are followed, and can be checked."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from minitron.errors import StorageError


def files_below(folder: str, depth: int | None = None) -> Iterator[str]:
    """Paths of everything below `folder` that is not a folder, at most `depth` levels deep, sorted by name.

    Links to folders are followed, except to a parent folder, which would be a cycle. Dangling links are included; `file_stat`
    raises an error for them. Raises OSError for a folder that cannot be listed.
    """
    yield from _below(folder.rstrip("/") or "/", depth, [])


def _below(folder: str, depth: int | None, above: list[tuple[int, int]]) -> Iterator[str]:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if not _is_folder(entry):
            yield entry.path
        elif depth is None or depth > 1:
            yield from _below(entry.path, None if depth is None else depth - 1, [*above, identity])


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def file_stat(path: str | os.PathLike[str]) -> os.stat_result | None:
    """os.stat of `path`, following links; None for anything but a regular file (a socket, a folder).

    Raises StorageError for a symbolic link that is dangling or refers to itself.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        if not os.path.islink(path):
            raise
        raise StorageError(
            f"{os.fspath(path)}: a symbolic link to {os.readlink(path)!r}, which cannot be read ({error.strerror})",
            "restore the file that it points to (in the hub's cache: download it again), or delete the link",
        ) from error
    return status if stat.S_ISREG(status.st_mode) else None


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether a local path is a pipe, socket or device; false if nothing is there.

    Looks once, because another process may create or remove the file between two looks.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_part_of(folder: Path, file: Path) -> bool:
    """Whether `file`, after resolving links, is inside `folder`, or in the blobs of the same repository in the hub's cache."""
    root, target = folder.resolve(), file.resolve()
    snapshot = next((each for each in (root, *root.parents) if each.parent.name == "snapshots"), None)
    blobs = root if snapshot is None else snapshot.parents[1] / "blobs"
    return target.is_relative_to(root) or target.is_relative_to(blobs)
