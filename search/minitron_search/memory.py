"""Worker processes of trials: they stay from one to the next, what one has freed is given back, and one that the memory
monitor kills does not end the others."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import ray
import torch
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.execution import tune_controller
from ray.tune.execution.class_cache import _ActorClassCache
from ray.tune.execution.tune_controller import TuneController
from ray.tune.utils.object_cache import _ObjectCache

from minitron_search.private_ray import is_private


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


class _LastingCache(_ObjectCache):
    """Keeps every actor until Tune ends. All trials of a pool take the same, so that any of them suits the next."""

    def cache_object(self, key: Any, obj: Any) -> bool:
        self._cached_objects[key].append(obj)
        self._num_cached_objects += 1
        return True

    def flush_cached_objects(self, force_all: bool = False) -> Iterator[Any]:
        return super().flush_cached_objects(force_all=True) if force_all else iter(())


class _DriversEnvironment(_ActorClassCache):
    """Where workers have the driver's environment they need none of their own, for which Ray would start others than those
    that wait already."""

    def get(self, trainable_cls: Any) -> Any:
        if not is_private():
            return super().get(trainable_cls)
        if trainable_cls not in self._cache:
            self._cache[trainable_cls] = ray.remote(trainable_cls)
        return self._cache[trainable_cls]


@cache
def workers_stay() -> None:
    """Make Tune keep the actors of finished trials, with `reuse_actors`, also where no other trial waits yet: it keeps one.
    It looks for new trials every tenth of a second, not every second, and takes workers that wait already."""
    tune_controller._ObjectCache = _LastingCache
    tune_controller._ActorClassCache = _DriversEnvironment
    next_trial = TuneController._update_trial_queue

    def update(self: TuneController, blocking: bool = False, timeout: int = 600) -> bool:
        found: bool = next_trial(self)
        if blocking and not found:
            time.sleep(0.1)
        return found

    TuneController._update_trial_queue = update
