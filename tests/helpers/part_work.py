"""Work for `minitron_platform.workers.parts` that can be counted, and that fails as its part says."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from unittest import mock

from minitron.data import shard_writing
from minitron.errors import InputError


def work(folder: str, part: int) -> int:
    """The square of `part`; the call is noted in a file. Part 1 kills its first worker, part 7 raises an error, and parts from
    100 on take until they are cancelled."""
    calls = Path(folder, f"{part}")
    count = len(calls.read_text()) if calls.exists() else 0
    calls.write_text("x" * (count + 1))
    if part == 1 and count < 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if part == 7:
        raise InputError("part 7 is wrong", "correct it")
    if part >= 100:
        time.sleep(600)
    return part * part


def logged(common, part):
    """What a handler in a worker prints of a library's warning."""
    record = logging.getLogRecordFactory()("library", logging.WARNING, "file.py", 1, part, (), None)
    return logging.Formatter().format(record)


def with_a_death(common, part):
    """A call of packing in parts. common: the function, what it is given, and a folder in which the calls for shards are noted;
    the first one for train-00001.bin kills its worker when it has read some of the shard's tokens."""
    function, inner, folder = common
    if function is shard_writing.write_shard:
        calls = Path(folder, part.name)
        first = not calls.exists()
        calls.write_text("x" if first else calls.read_text() + "x")
        if first and part.name == "train-00001.bin":
            reads = iter((shard_writing.read_ranges, lambda *_: os.kill(os.getpid(), signal.SIGKILL)))
            with mock.patch.object(shard_writing, "read_ranges", lambda *arguments: next(reads)(*arguments)):
                return function(inner, part)
    return function(inner, part)
