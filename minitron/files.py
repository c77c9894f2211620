"""Files of a local folder, symbolic links followed: the hub's cache is made of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from minitron.errors import StorageError


def files_below(folder: str, depth: int | None = None) -> Iterator[str]:
    """Paths of everything below `folder` that is not a folder, at most `depth` names deep, in the order of names.

    Links to folders are followed, but not to one that they lie in, so that a cycle ends. A link that leads nowhere is
    given as well: `file_stat` names it. Raises OSError for a folder that cannot be listed.
    """
    yield from _below(folder.rstrip("/") or "/", depth, [])


def _below(folder: str, depth: int | None, above: list[tuple[int, int]]) -> Iterator[str]:
    found = os.stat(folder)
    here = (found.st_dev, found.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if not _is_folder(entry):
            yield entry.path
        elif depth is None or depth > 1:
            yield from _below(entry.path, None if depth is None else depth - 1, [*above, here])


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def file_stat(path: str | os.PathLike[str]) -> os.stat_result | None:
    """What the system says of the file that `path` is or leads to; None where that is no regular file (a socket, a folder).

    Raises StorageError for a symbolic link that leads nowhere or back to itself.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        if not os.path.islink(path):
            raise
        raise StorageError(
            f"{os.fspath(path)}: a symbolic link to {os.readlink(path)!r}, which cannot be read ({error.strerror})",
            "restore the file that it leads to (in the hub's cache: download it again), or delete the link",
        ) from error
    return found if stat.S_ISREG(found.st_mode) else None
