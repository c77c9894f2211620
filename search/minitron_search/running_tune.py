"""Ray Tune in a background thread, so that its workers are reused from one round of trials to the next.

Starting a worker takes seconds, and each new worker reads the model that candidates are pruned from.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import RayError
from ray.tune import Callback, Stopper
from ray.tune.search import ConcurrencyLimiter, Searcher

from minitron import storage
from minitron.environment import environment_variables
from minitron.errors import StorageError
from minitron.garbage import collector_off
from minitron.log_records import make_records_safe
from minitron_search.events import Event, Failed, OutOfGpuMemory, Report, Retried, from_tune, to_tune
from minitron_search.failures import cause, not_retryable, out_of_gpu_memory, reason
from minitron_search.memory import release_memory
from minitron_search.ray_patches import keep_workers, patch_oom_as_actor_error

OnEvent = Callable[[str, Event], None]  # called with the candidate's key
LOOK_SECONDS = 2.0
TUNE_ENVIRONMENT = {
    # no progress tables, and no CSV, JSON and TensorBoard copies of what trials report
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Tune's own handling of Ctrl-C would end a search early as if it had finished.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Tune would count once, at its start, how many trials may wait for their workers. The limiter below counts again and again.
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",
}


@dataclass(frozen=True)
class WorkItem:
    """The work of one Tune trial: a pickled function that takes a `Report`, for the candidate with this key."""

    key: str
    work: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.key  # Tune makes it part of the trial's folder name


class RunningTune:
    """A Tune run that lasts from the first call of `run` until `close`.

    Up to `at_once()` trials run at a time, each with `resources`: that is asked again every LOOK_SECONDS, because nodes join
    and leave. If it is 0, one trial waits for its resources. A trial that raises or whose worker dies is restarted up to
    `max_failures` times. `scratch` is a folder for Tune's own files, which is deleted. Only this process needs it, because
    trials report no files: instead of a remote one, a temporary folder of this machine is used.
    """

    def __init__(
        self, scratch: str, resources: Mapping[str, float], at_once: Callable[[], int], max_failures: int
    ) -> None:
        self.scratch = scratch if storage.is_local(scratch) else ""
        self.resources = dict(resources)
        self.at_once = at_once
        self.max_failures = max_failures
        self.queue = _WorkQueue()
        self.limiter = ConcurrencyLimiter(self.queue, max_concurrent=1)
        shared = 0 < self.resources.get("GPU", 0) < 1
        self.round = _Round(max_failures if shared else None)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="tune")
        self.running: Future[None] | None = None
        self.stack = ExitStack()

    def run(
        self,
        work: Mapping[str, Callable[[Report], object]],
        on_event: OnEvent | None,
        look: Callable[[], None] = lambda: None,
    ) -> dict[str, str]:
        """Run the function of every key in a trial; returns the reason of each that failed for good. What `on_event` raises is
        raised here, and so is what `look` raises, which is called every LOOK_SECONDS.

        Raises StorageError if the storage cannot be used, which is not a candidate's fault.
        """
        self.round.begin(work, on_event)
        self._count_again()
        self.queue.waiting.extend(WorkItem(key, cloudpickle.dumps(function)) for key, function in work.items())
        if self.running is None:
            self.stack.enter_context(environment_variables(TUNE_ENVIRONMENT))
            self.running = self.thread.submit(self._fit)
            self.running.add_done_callback(lambda running: self.round.end())
        while not self.round.wait(LOOK_SECONDS):
            self._count_again()
            look()
        if self.running.done():
            if self.round.raised is not None:  # of some events Tune raises its text alone
                raise self.round.raised
            self.running.result()
        if error := self.round.error:
            raise StorageError(
                error.problem, f"{error.remedy}, then run again: finished candidates are kept"
            ) from error
        return self.round.failed

    @property
    def crowded_out(self) -> set[str]:
        """The keys whose trials of the last `run` ran out of memory on a shared GPU: they have neither finished nor failed."""
        return self.round.crowded_out

    def close(self, *, wait: bool = True) -> None:
        """End Tune and its workers; with `wait=False` trials that still run are cancelled."""
        self.round.cancelled = not wait
        self.queue.closed = True
        self.thread.shutdown()
        self.stack.close()

    def _count_again(self) -> None:
        self.limiter.max_concurrent = max(1, self.at_once())  # with 0 Tune would not hear of the end either

    def _fit(self) -> None:
        # A run resumes from the results and checkpoints of its trials, not from Tune's experiment state, which would have to
        # be unpickled. So Tune's folder is deleted.
        if self.scratch:
            storage.remove(self.scratch)  # left by a run that was killed
        else:
            self.scratch = tempfile.mkdtemp(prefix="minitron-tune-")
        patch_oom_as_actor_error()
        keep_workers()
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # every error is passed to `on_event`
        tuner = tune.Tuner(
            tune.with_resources(_trial, self.resources),
            tune_config=tune.TuneConfig(
                search_alg=self.limiter,
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=self.scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=self.max_failures),
                callbacks=[self.round],
                stop=StopOnStorageError(self.round),
            ),
        )
        try:
            tuner.fit()
        finally:
            with suppress(OSError, StorageError):  # Tune may still be writing there; the next run removes the rest
                storage.remove(self.scratch)


def _trial(config: dict[str, Any]) -> None:
    make_records_safe()
    work = _unpickled(config["item"].work)
    try:
        work(_report)
    except out_of_gpu_memory() as error:
        _report(OutOfGpuMemory(reason(error)))
    except not_retryable() as error:
        _report(Failed(reason(error)))  # not raised, so that Tune does not retry
    release_memory()  # the process is reused, or shares its GPU with another trial


def _unpickled(work: bytes) -> Callable[[Report], None]:
    """The work, and with it the imports that it needs."""
    is_first = "torch" not in sys.modules  # otherwise there was a trial before, whose garbage must be found
    with collector_off() if is_first else nullcontext():
        loaded: Callable[[Report], None] = cloudpickle.loads(work)
    return loaded


def _report(event: Event) -> None:
    tune.report(to_tune(event))


class _CancelledError(Exception):
    """Nobody waits for the trials any more."""


class _WorkQueue(Searcher):
    """Gives Tune the work items that wait, and ends the run once it is `closed` and empty."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = deque[WorkItem]()
        self.closed = False

    def suggest(self, trial_id: str) -> Any:
        closed = self.closed  # read before `waiting`, to which nothing is added after closing
        if self.waiting:
            return {"item": self.waiting.popleft()}
        return Searcher.FINISHED if closed else None

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass  # nothing is restored from Tune's experiment state


class StopOnStorageError(Stopper):
    """Ends all trials once the storage cannot be used: the others would fail as well."""

    def __init__(self, round: _Round) -> None:
        self.round = round

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.round.error is not None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for the reason given in `_Round`


class _Round(Callback):
    """Follows the trials of one call of `RunningTune.run`, in Tune's thread, and forwards their events.

    `failed` has the reason, by key, of each trial that failed for good; `error` is the storage error that ended all,
    and `raised` what `on_event` raised, which ends all too.
    `restarts` is the number of restarts of a trial that runs again with a whole GPU; None if all trials have whole GPUs.
    """

    def __init__(self, restarts: int | None) -> None:
        self.restarts = restarts
        self.crowded_out = set[str]()
        self.on_event: OnEvent | None = None
        self.failed: dict[str, str] = {}
        self.error: StorageError | None = None
        self.raised: BaseException | None = None
        self.cancelled = False
        self._unfinished = set[str]()
        self._ended = False
        self._changed = threading.Condition()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks with its experiment state, which is never restored

    def begin(self, keys: Mapping[str, object], on_event: OnEvent | None) -> None:
        self.on_event = on_event
        self.failed = {}
        self.crowded_out = set()
        self._unfinished = set(keys)

    def wait(self, seconds: float) -> bool:
        """Block until every trial of the round has ended, or Tune has, but not longer; returns whether they have."""
        with self._changed:
            return self._changed.wait_for(lambda: self._ended or not self._unfinished, seconds)

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.cancelled:
            raise _CancelledError

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if event := from_tune(result):
            self._forward(trial, event)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = _error(trial)
        left = trial.max_failures - trial.num_failures
        self._forward(trial, Retried(reason(error), str(error), _node(trial), left))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = _error(trial)
        raised = cause(error)
        if isinstance(raised, StorageError):
            self.error = raised
        else:
            self._forward(trial, Failed(reason(error), str(error)))
            self._finish(trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._finish(trial)

    def _finish(self, trial: Any) -> None:
        with self._changed:
            self._unfinished.discard(trial.config["item"].key)
            self._changed.notify_all()

    def _forward(self, trial: Any, event: Event) -> None:
        key = trial.config["item"].key
        if isinstance(event, OutOfGpuMemory):
            if self.restarts is None:
                event = Failed(event.reason)
            else:
                self.crowded_out.add(key)
                event = Retried(f"{event.reason}; next with a whole GPU", "", _node(trial), self.restarts)
        if isinstance(event, Failed):
            self.failed[key] = event.reason
        if self.on_event:
            try:
                self.on_event(key, event)
            except BaseException as error:
                self.raised = error
                raise


def _node(trial: Any) -> str:
    """Host name and address of the node from which a trial last reported; empty if it has not reported yet."""
    last = trial.last_result or {}
    return f"{last['hostname']} ({last['node_ip']})" if "hostname" in last else ""


def _error(trial: Any) -> BaseException:
    """The exception that ended a trial's latest attempt.

    Tune has just written it to the trial's folder on this machine: as text and, if a worker raised it, as a pickled object.
    """
    *_, text = Path(trial.error_file).read_text().split("Failure # ")
    if trial.pickled_error_file is not None:
        error: BaseException = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
        if text.strip().endswith(str(error).strip()):  # not the exception of an earlier attempt
            return error
    return RayError(text.split("\n", 1)[-1].strip())
