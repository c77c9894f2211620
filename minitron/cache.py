"""The user's cache folder for local copies of remote files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from minitron.errors import StorageError


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/minitron, by default ~/.cache/minitron; with mode 0700, because models may be private.

    Raises StorageError for a folder that another user owns, may write to, or put a link to, because its content could be
    forged or is not a cache.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "minitron"
    remedy = "set XDG_CACHE_HOME to a folder of your own"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status, entry = folder.stat(), folder.lstat()
    except OSError as error:
        raise StorageError(f"{folder}: cannot be used as a cache ({error.strerror})", remedy) from error
    for owner in (entry.st_uid, status.st_uid):
        if owner != os.getuid():
            raise StorageError(f"{folder}: belongs to user {owner}, not to you", remedy)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StorageError(f"{folder}: other users may write to it", f"chmod go-w {folder}, or {remedy}")
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        folder.chmod(0o700)
    return folder
