"""Main and GPU memory of a worker that goes from trial to trial."""

from __future__ import annotations

import ctypes

import torch


def release_memory() -> None:
    """Give back what the allocators keep for later.

    Tune runs every trial in a thread of its own. The C library's allocator keeps what a thread has freed for that thread: a
    worker that went from candidate to candidate would grow by a student's size with each.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
        trim(0)
