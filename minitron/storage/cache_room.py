"""A folder of copies that several processes use: a lock for each copy, and a limit for all of them."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron.errors import InputError
from minitron.storage.files import MANIFEST, remove, size
from minitron.storage.folders import sweep
from minitron.storage.private import lock_file

log = logging.getLogger(__name__)

LIMIT = "MINITRON_CACHE_GB"
DISK_SHARE = 0.5  # of the disk's size, where LIMIT is not set
IN_USE_SECONDS = 3600  # whoever was given a copy has opened its files by then


@contextmanager
def locked(copy: Path, *, wait: bool = True) -> Iterator[bool]:
    """Within the block no other process changes this copy; false if it is locked by another and `wait` is false."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(copy.with_name(f".{copy.name}.lock")) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def make_room(folder: Path, needed: int) -> None:
    """Delete the copies that were not used for the longest time until `needed` more bytes fit below the limit: that of the
    environment variable MINITRON_CACHE_GB, else half of the disk. A copy that was used in the last hour is kept."""
    for name in {path.name.split(".")[1] for path in folder.glob(".*.tmp")}:
        sweep(folder, name)
    # those whose names begin with a dot are being made or deleted
    copies = [path.parent for path in folder.glob(f"*/{MANIFEST}") if not path.parent.name.startswith(".")]
    used = {copy: at for copy in copies if (at := _last_used(copy)) is not None}
    sizes = {copy: size(str(copy)) for copy in used}
    excess = sum(sizes.values()) + needed - _limit(folder)
    for copy in sorted(used, key=used.__getitem__):
        if excess <= 0 or time.time() - used[copy] < IN_USE_SECONDS:
            break
        with locked(copy, wait=False) as free:
            if free and _last_used(copy) in (used[copy], None):  # not used meanwhile, or deleted by another process
                log.info("%s: deleted, not used for the longest time", copy)
                remove(str(copy))
                excess -= sizes[copy]


def _last_used(copy: Path) -> float | None:
    """When a copy was last used, a Unix time; None if another process has deleted it."""
    try:
        return (copy / MANIFEST).stat().st_mtime
    except FileNotFoundError:
        return None


def _limit(folder: Path) -> float:
    text = os.environ.get(LIMIT)
    if text is None:
        return DISK_SHARE * shutil.disk_usage(folder).total
    try:
        return float(text) * 1e9
    except ValueError as error:
        raise InputError(f"{LIMIT}: {text!r} is not a number", "give the size of the cache in GB") from error
