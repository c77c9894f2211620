"""Changes to Ray's own code, made when they are needed and in no other process than this one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

from minitron_search.private_ray import is_private


@cache
def patch_oom_as_actor_error() -> None:
    """Make Tune take a worker that Ray's memory monitor killed for a trial that failed, whichever way it hears of it.

    Mostly that is RayActorError, which Tune knows; where the task's error is there before the actor's, it is
    OutOfMemoryError, at which Tune would end the whole search. A Ray that has no such private class is left as it is, with a
    warning.
    """
    from ray.exceptions import OutOfMemoryError, RayActorError

    try:
        from ray.air.execution._internal.actor_manager import RayActorManager

        original = RayActorManager._actor_task_failed
    except (ImportError, AttributeError) as error:
        _warn(error, "a trial that the memory monitor kills may end the search")
        return

    def failed(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        original(self, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = failed


@cache
def keep_workers() -> None:
    """Make Tune keep the actors of finished trials, with `reuse_actors`, also where no other trial waits yet: it keeps one.
    It looks for new trials every tenth of a second, not every second, and takes workers that wait already. A Ray that has no
    such private classes is left as it is, with a warning."""
    import ray

    try:
        from ray.tune.execution import tune_controller
        from ray.tune.execution.class_cache import _ActorClassCache
        from ray.tune.execution.tune_controller import TuneController
        from ray.tune.utils.object_cache import _ObjectCache

        next_trial = TuneController._update_trial_queue
    except (ImportError, AttributeError) as error:
        _warn(error, "workers are started again for every round of a search")
        return

    class LastingCache(_ObjectCache):
        """Keeps every actor until Tune ends. All trials of a pool take the same, so that any of them suits the next."""

        def cache_object(self, key: Any, obj: Any) -> bool:
            self._cached_objects[key].append(obj)
            self._num_cached_objects += 1
            return True

        def flush_cached_objects(self, force_all: bool = False) -> Iterator[Any]:
            return super().flush_cached_objects(force_all=True) if force_all else iter(())

    class DriversEnvironment(_ActorClassCache):
        """Where workers have the driver's environment they need none of their own, for which Ray would start others than
        those that wait already."""

        def get(self, trainable_cls: Any) -> Any:
            if not is_private():
                return super().get(trainable_cls)
            if trainable_cls not in self._cache:
                self._cache[trainable_cls] = ray.remote(trainable_cls)
            return self._cache[trainable_cls]

    def update(self: TuneController, blocking: bool = False, timeout: int = 600) -> bool:
        found: bool = next_trial(self)
        if blocking and not found:
            time.sleep(0.1)
        return found

    tune_controller._ObjectCache = LastingCache
    tune_controller._ActorClassCache = DriversEnvironment
    TuneController._update_trial_queue = update


def _warn(error: Exception, consequence: str) -> None:
    warnings.warn(f"this version of Ray is not known ({error}): {consequence}", RuntimeWarning, stacklevel=3)
