"""Ray Tune for as long as there may be more work: in a thread of its own, so that its workers stay from one round of work to
the next. Starting a worker takes seconds, and each reads the model again that candidates are cut from."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import RayError
from ray.tune import Callback, Stopper
from ray.tune.search import Searcher

from minitron import storage
from minitron.environment import environment_variables
from minitron.errors import StorageError
from minitron_search.events import Event, Failed, Report, Retried, from_tune, to_tune
from minitron_search.failures import NOT_RETRYABLE, cause, reason
from minitron_search.memory import release_memory
from minitron_search.ray_patches import keep_workers, patch_oom_as_actor_error

OnEvent = Callable[[str, Event], None]  # by the candidate's key
TUNE = {
    # none of its tables, and no CSV, JSON and TensorBoard copies of what trials report
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Its own handling of Ctrl-C would end a search early as if it were finished.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


@dataclass(frozen=True)
class Piece:
    """What one trial of Tune does: `work`, a pickled function that takes a `Report`, for the candidate with this key."""

    key: str
    work: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.key  # a part of the name of Tune's folder


class RunningTune:
    """Tune, from the first round of work until `close`: `at_once` pieces at a time, each with `resources`. One that raises or
    whose worker dies is started again up to `max_failures` times. `scratch` is a folder that all nodes share; it is deleted."""

    def __init__(self, scratch: str, resources: Mapping[str, float], at_once: int, max_failures: int) -> None:
        self.scratch, self.resources = scratch, dict(resources)
        self.at_once, self.max_failures = at_once, max_failures
        self.feed, self.rounds = _Feed(), _Rounds()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="tune")
        self.running: Future[None] | None = None
        self.stack = ExitStack()

    def do(self, work: Mapping[str, Callable[[Report], object]], on_event: OnEvent | None) -> dict[str, str]:
        """Do the work of every key; reasons by key of what was given up. What `on_event` raises is raised here.

        Raises StorageError for storage that cannot be used, which is no candidate's fault.
        """
        self.rounds.begin(work, on_event)
        self.feed.waiting.extend(Piece(key, cloudpickle.dumps(function)) for key, function in work.items())
        if self.running is None:
            self.stack.enter_context(environment_variables(TUNE))
            self.running = self.thread.submit(self._fit)
            self.running.add_done_callback(lambda running: self.rounds.end())
        self.rounds.wait()
        if self.running.done():
            self.running.result()
        if error := self.rounds.error:
            raise StorageError(error.problem, f"{error.remedy}; run again then: what has finished is kept") from error
        return self.rounds.failed

    def close(self, *, at_once: bool = False) -> None:
        """End Tune and its workers: when they have stopped, or without waiting for what they do."""
        self.rounds.broken = at_once
        self.feed.closed = True
        self.thread.shutdown()
        self.stack.close()

    def _fit(self) -> None:
        # Tune's own experiment state is not what a run resumes from (restoring it would mean trusting pickles): results and
        # checkpoints of trials are, so its folder is thrown away.
        storage.remove(self.scratch)  # a killed run's
        patch_oom_as_actor_error()
        keep_workers()
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # `on_event` is told of every error
        tuner = tune.Tuner(
            tune.with_resources(_trial, self.resources),
            tune_config=tune.TuneConfig(
                search_alg=self.feed, num_samples=-1, reuse_actors=True, max_concurrent_trials=self.at_once
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=self.scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=self.max_failures),
                callbacks=[self.rounds],
                stop=StopOnStorageError(self.rounds),
            ),
        )
        try:
            tuner.fit()
        finally:
            with suppress(OSError, StorageError):  # Tune may still be writing there; the next run removes the rest
                storage.remove(self.scratch)


def _trial(config: dict[str, Any]) -> None:
    try:
        cloudpickle.loads(config["piece"].work)(_report)
    except NOT_RETRYABLE as error:
        _report(Failed(reason(error)))  # not raised, so that Tune does not try again
    release_memory()  # the process stays, for the next candidate or beside one on the same GPU


def _report(event: Event) -> None:
    tune.report(to_tune(event))


class _BrokenOffError(Exception):
    """Nobody waits for the work any more."""


class _Feed(Searcher):
    """Gives Tune the pieces that wait, and tells it that no more will come when `closed`."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = deque[Piece]()
        self.closed = False

    def suggest(self, trial_id: str) -> Any:
        closed = self.closed  # before the look: nothing is added after it
        if self.waiting:
            return {"piece": self.waiting.popleft()}
        return Searcher.FINISHED if closed else None

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass  # nothing is restored from Tune's own state


class StopOnStorageError(Stopper):
    """Ends everything once storage cannot be used: what still runs would fail as well."""

    def __init__(self, rounds: _Rounds) -> None:
        self.rounds = rounds

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.rounds.error is not None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as those of the callback


class _Rounds(Callback):
    """Follows the pieces of a round in Tune's thread, and hands on what they report and raise. `failed` are the reasons, by
    key, of those given up, `error` says why all were."""

    def __init__(self) -> None:
        self.on_event: OnEvent | None = None
        self.failed: dict[str, str] = {}
        self.error: StorageError | None = None
        self.broken = False
        self._left = set[str]()
        self._over = False
        self._changed = threading.Condition()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks with its experiment state, which is never restored

    def begin(self, keys: Mapping[str, object], on_event: OnEvent | None) -> None:
        self.on_event, self.failed, self._left = on_event, {}, set(keys)

    def wait(self) -> None:
        """Until nothing of the round is left, or Tune has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or not self._left)

    def end(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.broken:
            raise _BrokenOffError

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if event := from_tune(result):
            self._pass_on(trial, event)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = _error(trial)
        left = trial.max_failures - trial.num_failures
        self._pass_on(trial, Retried(reason(error), str(error), _node(trial), left))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = _error(trial)
        raised = cause(error)
        if isinstance(raised, StorageError):
            self.error = raised
        else:
            self._pass_on(trial, Failed(reason(error), str(error)))
            self._done(trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._done(trial)

    def _done(self, trial: Any) -> None:
        with self._changed:
            self._left.discard(trial.config["piece"].key)
            self._changed.notify_all()

    def _pass_on(self, trial: Any, event: Event) -> None:
        key = trial.config["piece"].key
        if isinstance(event, Failed):
            self.failed[key] = event.reason
        if self.on_event:
            self.on_event(key, event)


def _node(trial: Any) -> str:
    """Host name and address of the node that a trial last reported from; empty if it has not yet."""
    last = trial.last_result or {}
    return f"{last['hostname']} ({last['node_ip']})" if "hostname" in last else ""


def _error(trial: Any) -> BaseException:
    """What ended a trial's latest attempt.

    Tune has just put it in the trial's folder on this machine: as text, and what a worker raised as an object as well.
    """
    *_, text = Path(trial.error_file).read_text().split("Failure # ")
    if trial.pickled_error_file is not None:
        error: BaseException = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
        if text.strip().endswith(str(error).strip()):  # not that of an earlier attempt
            return error
    return RayError(text.split("\n", 1)[-1].strip())
