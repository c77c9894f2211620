"""Patches of Ray's own code, applied when they are needed and in this process alone."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

from minitron.errors import MinitronError
from minitron_search.private_ray import is_private


@cache
def patch_oom_as_actor_error() -> None:
    """Make Tune treat every worker that Ray's memory monitor killed as a failed trial.

    Usually Ray raises RayActorError for it, which Tune handles. If the task's error arrives before the actor's, it raises
    OutOfMemoryError, at which Tune would end the whole search. A version of Ray without the private class is not patched; a
    warning says so.
    """
    from ray.exceptions import OutOfMemoryError, RayActorError

    try:
        from ray.air.execution._internal.actor_manager import RayActorManager

        original = RayActorManager._actor_task_failed
    except (ImportError, AttributeError) as error:
        _warn(error, "a trial that Ray's memory monitor kills may end the search")
        return

    def failed(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        original(self, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = failed


@cache
def keep_workers() -> None:
    """Make Tune keep all actors of finished trials for `reuse_actors`, also while no other trial waits; unpatched it keeps one.

    A kept actor that has died since, as with its node, gets no trial: that would be a failure of the trial.
    Tune also looks for new trials every tenth of a second instead of every second, and in a private Ray uses workers that have
    already started. A version of Ray without the private classes is not patched; a warning says so, and in a private Ray
    MinitronError is raised.
    """
    import ray

    try:
        from ray.tune.execution import tune_controller
        from ray.tune.execution.class_cache import _ActorClassCache
        from ray.tune.execution.tune_controller import TuneController
        from ray.tune.utils.object_cache import _ObjectCache

        next_trial = TuneController._update_trial_queue
        reuse = TuneController._maybe_reuse_cached_actor
    except (ImportError, AttributeError) as error:
        if is_private():  # without the agent that sets up the runtime environments of Tune's own actors
            raise MinitronError(
                f"this version of Ray is not supported ({error})", "install one that Minitron allows: ray>=2.60,<2.61"
            ) from error
        _warn(error, "workers are restarted for every round of a search")
        return

    class LastingCache(_ObjectCache):
        """Keeps every actor until Tune ends. All trials of a pool request the same resources, so that any actor fits."""

        def cache_object(self, key: Any, obj: Any) -> bool:
            self._cached_objects[key].append(obj)
            self._num_cached_objects += 1
            return True

        def first(self, key: Any) -> Any:
            """The actor that is reused next; None if there is none."""
            return next(iter(self._cached_objects[key]), None)

        def flush_cached_objects(self, force_all: bool = False) -> Iterator[Any]:
            return super().flush_cached_objects(force_all=True) if force_all else iter(())

    class DriversEnvironment(_ActorClassCache):
        """Creates actors without a runtime environment in a private Ray, whose workers have the driver's environment: it has no
        agent that sets up another, and would start new workers for it instead of using those that wait."""

        def get(self, trainable_cls: Any) -> Any:
            if not is_private():
                return super().get(trainable_cls)
            if trainable_cls not in self._cache:
                self._cache[trainable_cls] = ray.remote(trainable_cls)
            return self._cache[trainable_cls]

    def update(self: TuneController, blocking: bool = False, timeout: int = 600) -> bool:
        has_trial: bool = next_trial(self)
        if blocking and not has_trial:
            time.sleep(0.1)
        return has_trial

    def reuse_living(self: TuneController, trial: Any) -> bool:
        key = trial.placement_group_factory
        while (actor := self._actor_cache.first(key)) is not None and _is_dead(self._actor_manager, actor):
            self._actor_cache.pop_cached_object(key)
            actor.set_on_stop(None)
            actor.set_on_error(None)
            self._remove_actor(tracked_actor=actor)
        reused: bool = reuse(self, trial)
        return reused

    tune_controller._ObjectCache = LastingCache
    tune_controller._ActorClassCache = DriversEnvironment
    TuneController._update_trial_queue = update
    TuneController._maybe_reuse_cached_actor = reuse_living


def _is_dead(manager: Any, tracked_actor: Any) -> bool:
    """Whether Ray knows that an actor of Tune's manager has died."""
    from minitron_search.placement_groups import is_dead

    actor, _ = manager._live_actors_to_ray_actors_resources[tracked_actor]
    return is_dead(actor._actor_id.binary())


def _warn(error: Exception, consequence: str) -> None:
    warnings.warn(f"this version of Ray is not supported ({error}): {consequence}", RuntimeWarning, stacklevel=3)
