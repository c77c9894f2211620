"""Imports without Python's garbage collector, which otherwise takes a third of their time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_off() -> Iterator[None]:
    """Within the block, which imports libraries, this process collects no garbage. Later collections leave out what is there at
    the block's end, so that this is for processes that the project starts: a user's own may hold garbage by then.

    torch, transformers and Ray are five thousand modules whose functions and classes last as long as the process: the collector
    goes through them again and again while they come, and finds next to nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
