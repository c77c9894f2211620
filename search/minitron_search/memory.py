"""Main and GPU memory of a process that runs one trial or stage after another."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_memory() -> None:
    """Return freed memory, which the allocators keep for reuse, to the system; with a GPU also the memory of reference cycles,
    because other processes may use the same GPU.

    Tune runs every trial in a thread of its own, and the C library's allocator keeps memory that a thread has freed for that
    thread: a worker would grow by the size of a student with every candidate.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc alone has it
        trim(0)
