"""Local files of this process's own: created for their owner alone, and never opened through a symbolic link."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron.errors import StorageError

PRIVATE = 0o600
"""Mode of files that hold what other users of the machine need not read: databases, recipes, records."""


@contextmanager
def lock_file(path: Path) -> Iterator[int]:
    """A descriptor of the file at `path` to lock with flock. It is created with mode 0600, and its content never changes.

    Raises StorageError for a symbolic link, which may lead to a file that is not a lock, and for anything but a file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    remedy = "someone else may have put it there: delete it, and run again"
    try:
        descriptor = os.open(path, flags, PRIVATE)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise StorageError(f"{path}: a link or a folder, where a lock should be", remedy) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StorageError(f"{path}: not a file, where a lock should be", remedy)
        yield descriptor
    finally:
        os.close(descriptor)


def write_new(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write `data` to a file that does not exist yet, and sync it to disk. mode: of the file, before the umask.

    Raises FileExistsError for anything at `path`, also for a link that leads nowhere.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
