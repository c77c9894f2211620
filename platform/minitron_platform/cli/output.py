"""Standard output and errors that cannot be written: a full disk behind them, or a device that is gone."""

from __future__ import annotations

import os
import sys

from minitron.errors import StorageError


def unwritable(text: str = "") -> StorageError | None:
    """The error, with a remedy, if a standard stream refuses `text` or what waits to be written. Both are dropped then, and
    what is written there later, so that Python does not complain once more when it ends."""
    problems = []
    for name, stream in (("output", sys.stdout), ("errors", sys.stderr)):
        try:
            stream.write(text)
            stream.flush()
        except OSError as error:
            problems.append(f"standard {name} cannot be written ({error.strerror})")
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)
    remedy = "free some space where it goes, or send it elsewhere, and repeat the command; what is finished is kept"
    return StorageError("; ".join(problems), remedy) if problems else None
