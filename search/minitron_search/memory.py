"""Main memory of trials: what one has freed is given back, and one that the memory monitor kills does not end the others."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError


def release_memory() -> None:
    """Give back what the allocators keep for later.

    Tune runs every trial in a thread of its own. The C library's allocator keeps what a thread has freed for that thread: a
    worker that went from candidate to candidate would grow by a student's size with each.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
        trim(0)


@cache
def killed_workers_fail_alone() -> None:
    """Make Tune take a worker that Ray's memory monitor killed for a trial that failed, whichever way it hears of it.

    Mostly that is RayActorError, which Tune knows; where the task's error is there before the actor's, it is
    OutOfMemoryError, at which Tune would end the whole search.
    """
    known = RayActorManager._actor_task_failed

    def failed(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        known(self, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = failed
