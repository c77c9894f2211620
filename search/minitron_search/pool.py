"""Ray Tune as a pool: one piece of work for each of many candidates, as many at a time as the cluster has room for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.exceptions import RayError
from ray.tune import Callback, Stopper

from minitron import storage
from minitron.architecture import Architecture
from minitron.environment import environment_variables
from minitron.errors import InputError, MinitronError, StorageError
from minitron_search.failures import CERTAIN, cause, reason
from minitron_search.memory import killed_workers_fail_alone, release_memory
from minitron_search.room import at_once
from minitron_search.trial import Report, trial_key

Event = Callable[[str, dict[str, Any]], None]
Work = Callable[[Architecture, Report], Any]
TUNE = {
    # none of its tables, and no CSV, JSON and TensorBoard copies of what trials report
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Its own handling of Ctrl-C would end a search early as if it were finished.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


@dataclass(frozen=True)
class Pool:
    """How work is carried out, as many pieces at a time as the cluster has room for.

    `scratch` is a folder that all nodes share, for Ray's own use; it is deleted. A piece has as many processes as `workers`
    says, more than one by Ray Train, and each takes `share`: Ray's names and amounts, "memory" in bytes. One that raises or
    whose worker dies is started again up to `max_failures` times, except where the same would happen again (a loss that is
    not finite, InputError, no room on the GPU). `on_event(key, numbers)` is called in this process with what each reports;
    key is `trial_key(architecture)`, and "pid" in the numbers is the piece's process.
    """

    scratch: str
    share: dict[str, float] = field(default_factory=lambda: {"CPU": 1})
    workers: int = 1
    max_failures: int = 3
    on_event: Event | None = None

    def run(
        self, work: Work, architectures: Sequence[Architecture], done: Callable[[Architecture], object]
    ) -> dict[str, str]:
        """Do `work` for every architecture that is not `done` (false or None); reasons by name of those that failed.

        Raises StorageError for storage that cannot be used, which is no candidate's fault, InputError where the cluster
        has no room for a single piece, and MinitronError when Tune was stopped.
        """
        waiting = [architecture for architecture in architectures if not done(architecture)]
        if not waiting:
            return {}
        by_key = {trial_key(architecture): architecture for architecture in waiting}
        ending = _Ending()
        events = _Events(self.on_event, ending)
        with environment_variables(TUNE):
            self._fit(work, by_key, events, ending)
        if error := ending.error:
            raise StorageError(error.problem, f"{error.remedy}; run again then: what has finished is kept") from error
        failures = {str(a): events.failed[key] for key, a in by_key.items() if key in events.failed and not done(a)}
        stopped = [str(a) for a in waiting if not done(a) and str(a) not in failures]
        if stopped:
            raise MinitronError(
                f"{len(stopped)} of {len(architectures)} candidates were stopped ({', '.join(stopped)})",
                "run again to go on; what has finished is kept",
            )
        return failures

    def _fit(self, work: Work, by_key: dict[str, Architecture], events: _Events, ending: _Ending) -> None:
        def trainable(config: dict[str, Any]) -> None:
            try:
                work(by_key[config["candidate"]], tune.report)
            except CERTAIN as error:
                tune.report({"failed": reason(error)})  # not raised, so that Tune does not try again
            release_memory()  # the process stays, for the next candidate or beside one on the same GPU

        # Tune's own experiment state is not what a run resumes from (restoring it would mean trusting pickles): results and
        # checkpoints of trials are, so its folder is thrown away.
        storage.remove(self.scratch)  # a killed run's
        killed_workers_fail_alone()
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # `on_event` is told of every error
        tuner = tune.Tuner(
            # Several workers are started from a process that takes next to nothing, or they would have no room beside it.
            tune.with_resources(trainable, self.share if self.workers == 1 else {"memory": 1}),
            param_space={"candidate": tune.grid_search(list(by_key))},
            # Tune does not see what workers started by a trial take: more trials than fit would wait for each other.
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=self._at_once()),
            run_config=tune.RunConfig(
                name="search",
                storage_path=self.scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=self.max_failures),
                callbacks=[events],
                stop=ending,
            ),
        )
        try:
            tuner.fit()  # its result knows no candidate of those that died before they reported
        finally:
            with suppress(OSError, StorageError):  # Tune may still be writing there; the next run removes the rest
                storage.remove(self.scratch)

    def _at_once(self) -> int:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if found := at_once(nodes, self.share, self.workers):
            return found
        wanted, there = (
            ", ".join(f"{name} {amount:g}" for name, amount in resources.items())
            for resources in (self.share, {name: sum(node.get(name, 0) for node in nodes) for name in self.share})
        )
        raise InputError(
            f"a trial takes {self.workers} x ({wanted}), each part on one node, and {len(nodes)} nodes have {there} in all",
            "lower resources.workers_per_trial, cpus_per_trial or gpus_per_trial, or use a larger cluster",
        )


class _Ending(Stopper):
    """Ends everything once storage cannot be used: what still runs would fail as well."""

    def __init__(self) -> None:
        self.error: StorageError | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.error is not None


class _Events(Callback):
    """Hands on what trials report and raise, in the driver; `failed` are the reasons, by key, of those given up."""

    def __init__(self, on_event: Event | None, ending: _Ending) -> None:
        self.on_event, self.ending = on_event, ending
        self.failed: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks with its experiment state, which is never restored

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._tell(trial, {k: v for k, v in result.items() if k in _REPORTED})

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error, left = _error(trial), trial.max_failures - trial.num_failures
        self._tell(trial, {"retried": reason(error), "trace": str(error), "node": _node(trial), "restarts_left": left})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = _error(trial)
        raised = cause(error)
        if isinstance(raised, StorageError):
            self.ending.error = raised
        else:
            self._tell(trial, {"failed": reason(error), "trace": str(error)})

    def _tell(self, trial: Any, numbers: dict[str, Any]) -> None:
        if "failed" in numbers:
            self.failed[trial.config["candidate"]] = numbers["failed"]
        if self.on_event:
            self.on_event(trial.config["candidate"], numbers)


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


_REPORTED = (
    "pid",
    "step",
    "steps",
    "rung",
    "paused",
    "scored",
    "evaluated",
    "kl",
    "loss",
    "train_loss",
    "train_kl",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "failed",
)
