"""A group of processes of Ray Train that runs one function after another.

The processes start once and serve all stages of a run: their start, imports and process group take longer than many a stage.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, TrainingFailedError

from minitron import storage
from minitron.errors import MinitronError, StorageError
from minitron_platform.workers.calls import GroupEnded, Returned, start_calls
from minitron_platform.workers.policies import CallFailurePolicy, ControllerStarted
from minitron_platform.workers.serve import serve
from minitron_platform.workers.worker import Worker
from minitron_search.elastic import ElasticPolicy, scaling_config
from minitron_search.failures import first_cause, reason
from minitron_search.placement_groups import withdraw_requests
from minitron_search.torch_trainer import TorchTrainer
from minitron_search.train_files import storage_settings

CLOSE_SECONDS = 30  # longest wait for workers to end by themselves
LOOK_SECONDS = 2.0

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerGroup:
    """At most `count` processes and at least `least`, each with `share` of Ray's resources and `threads` threads on CPUs.

    scratch: folder that all nodes share, for Ray Train's own files; it is deleted when the group closes.
    """

    def __init__(
        self,
        count: int,
        share: dict[str, float],
        *,
        threads: int,
        max_failures: int,
        scratch: str,
        least: int | None = None,
    ) -> None:
        self.calls = start_calls(max_failures)
        self.scratch = scratch
        self.max_failures = max_failures
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        storage.remove(scratch)  # of a run that was killed
        elastic = least is not None and least < count
        scaling = scaling_config(count, least if elastic else None, share)
        failures = FailureConfig(max_failures=max_failures)
        trainer = TorchTrainer(
            serve,
            train_loop_config={"calls": self.calls, "threads": threads},
            scaling_config=scaling,
            # A new name each time, so that Ray Train does not resume from a snapshot of its own.
            run_config=RunConfig(
                name=f"workers-{uuid.uuid4().hex[:8]}",
                **storage_settings(scratch),
                failure_config=failures,
            ),
            failure_policy=CallFailurePolicy(failures, self.calls),
            scaling_policy=ElasticPolicy(scaling, self.calls) if elastic else None,
            callbacks=[ControllerStarted(self.calls)],
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="workers")
        self._ended = self._thread.submit(trainer.fit)
        self._ended.add_done_callback(self._report_end)

    @property
    def is_open(self) -> bool:
        """Whether the group can take a call."""
        return not self._ended.done()

    def run(
        self,
        function: Callable[[Task, Worker], Result],
        task: Task,
        on_event: Callable[[Any], None],
        *,
        everywhere: bool = True,
        look: Callable[[], None] = lambda: None,
        before_commit: Callable[[], None] = lambda: None,
    ) -> Result:
        """Call `function(task, worker)` in every process, or only in the first one; returns what the first one returns.

        `function` must be defined in a module of this project. It must bear to be called again for the same task, because all
        processes are restarted if one of them fails, up to `max_failures` times. on_event: called with the events of the
        processes. look: called every LOOK_SECONDS while there is no event; what it raises ends the workers.
        before_commit: of the `Worker`s, to which it is pickled.

        Raises a MinitronError that the function returned or raised, and MinitronError if the workers failed too often; in
        the last two cases the group has ended.
        """
        content = ray.put((function, task, before_commit))
        try:
            ray.get(self.calls.start.remote([content], everywhere))
            while True:
                event = self.calls.get.remote()
                while not ray.wait([event], timeout=LOOK_SECONDS)[0]:
                    look()
                match ray.get(event):
                    case Returned(result):
                        break
                    case GroupEnded():
                        raise self._failure()
                    case event:
                        on_event(event)
        except RayError as error:  # Ray has stopped
            raise self._failure() from error
        except BaseException:
            self._kill()
            raise
        value = result[0]
        if isinstance(value, MinitronError):
            raise value
        return value

    def close(self) -> None:
        """End the workers and free their resources."""
        with suppress(RayError):
            ray.get(self.calls.stop.remote())
            if ray.get(self.calls.handles.remote()):
                wait([self._ended], CLOSE_SECONDS)
        if self.is_open:
            self._kill()
        with suppress(RayError):
            ray.kill(self.calls)
        # if the thread used Ray after Ray's shutdown, that would end the process
        self._thread.shutdown(wait=self._ended.done())
        with suppress(OSError, StorageError):  # Ray Train may still write there; the next run removes the rest
            storage.remove(self.scratch)

    def _report_end(self, ended: Future[Any]) -> None:
        if not ray.is_initialized():  # the call would start another Ray
            return
        with suppress(RayError):  # Ray has stopped, which the caller of `run` sees by itself
            ray.get(self.calls.put.remote(GroupEnded()))

    def _kill(self) -> None:
        """End the workers in the middle of a call."""
        with suppress(RayError):
            ray.get(self.calls.stop.remote())
            workers = list(map(cloudpickle.loads, ray.get(self.calls.handles.remote())))
            # without workers Ray Train waits for resources, and would not end by itself
            controllers = [] if workers else list(map(cloudpickle.loads, ray.get(self.calls.controllers.remote())))
            for actor in workers or controllers:
                ray.kill(actor)
            for controller in controllers:
                withdraw_requests(controller)
        wait([self._ended], CLOSE_SECONDS)

    def _failure(self) -> BaseException:
        """The error that ended the group, for the user."""
        wait([self._ended], CLOSE_SECONDS)
        error = self._ended.exception() if self._ended.done() else None
        if not isinstance(error, TrainingFailedError):
            return error or MinitronError("the workers have ended without a reason", "run again to continue")
        ranks, cause = first_cause(getattr(error, "worker_failures", {0: error}))
        if isinstance(cause, MinitronError):
            return cause
        return MinitronError(
            f"the workers failed too often, the last time worker {', '.join(map(str, ranks))}: {reason(cause)}",
            "run again to continue from what is finished; resources.max_failures is the number of failures allowed",
        )
