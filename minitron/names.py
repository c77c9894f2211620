"""Names of files that come out of a file, such as those a manifest lists: checked before anything is read or written."""

from __future__ import annotations

from pathlib import Path

from minitron.errors import StorageError

LONGEST_NAME = 1024  # characters; object stores allow as many bytes


def check_name(name: object, source: str) -> str:
    """`name`, if it is a relative path that stays below the folder it is joined to; `source` is the file that has it.

    Raises StorageError for an absolute path, `..`, empty parts, backslashes, control characters and what is not text.
    """
    bad = (
        not isinstance(name, str)
        or not 0 < len(name) <= LONGEST_NAME
        or any(part in ("", ".", "..") for part in name.split("/"))
        or any(character == "\\" or not character.isprintable() for character in name)
    )
    if bad:
        raise StorageError(
            f"{source}: names the file {str(name)[:200]!r}, which is not a relative path below its folder",
            "somebody else may have written it: don't use this folder; delete it and run again",
        )
    return str(name)


def inside(folder: Path, name: str, source: str) -> Path:
    """`folder`/`name`, checked once more after links are resolved. Raises StorageError where it leaves the folder."""
    path = folder / check_name(name, source)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise StorageError(
            f"{source}: {name!r} leads out of {folder} through a link", "delete the link, or don't use this folder"
        )
    return path
