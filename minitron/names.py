"""Checks of file names that were read from a file, such as a manifest, before anything is read or written."""

from __future__ import annotations

from pathlib import Path

from minitron.errors import StorageError

LONGEST_NAME = 1024  # characters; object stores allow as many bytes


def check_name(name: object, source: str) -> str:
    """`name`, if it is a relative path inside the folder that it is joined to. source: the file that contains the name.

    Raises StorageError for absolute paths, `..`, empty parts, backslashes, control characters and non-strings.
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
            "it may have been written by someone else: do not use this folder; delete it and run again",
        )
    return str(name)


def inside(folder: Path, name: str, source: str) -> Path:
    """`folder`/`name`, also checked after resolving links. Raises StorageError if it is outside the folder."""
    path = folder / check_name(name, source)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise StorageError(
            f"{source}: {name!r} leads out of {folder} through a link", "delete the link, or don't use this folder"
        )
    return path
