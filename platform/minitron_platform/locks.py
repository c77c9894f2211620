"""One process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from minitron import storage
from minitron.errors import MinitronError
from minitron_platform.context import Places


@contextmanager
def lock(where: Places, name: str, what: str) -> Iterator[None]:
    """Hold the lock `name` of this machine, which the operating system drops when its holder is killed.

    Raises MinitronError, saying which process does `what`, if another holds it.
    """
    path = storage.local_path(where.local) / name
    with storage.disk_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 (held open as long as the lock)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise MinitronError(
                f"{what} is already going on in process {file.read().strip() or '?'}",
                "wait for it, or stop that process",
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
