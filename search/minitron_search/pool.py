"""Ray Tune as a pool: one piece of work for each of many candidates, as many at a time as the cluster has room for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

# Before Tune is imported: none of its tables, and no CSV, JSON and TensorBoard copies of what trials report.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Its own handling of Ctrl-C would end a search early as if it were finished.
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"

from ray import tune
from ray.tune import Callback

from minitron import storage
from minitron.architecture import Architecture
from minitron.errors import InputError, MinitronError, NonFiniteError
from minitron_search.trial import Report, trial_key

Event = Callable[[str, dict[str, Any]], None]
Work = Callable[[Architecture, Report], Any]


@dataclass(frozen=True)
class Pool:
    """How work is carried out: what each piece takes (`cpu`, `gpu`, `memory` in bytes), how often it is started again when
    its worker dies, a folder that all nodes share for Tune's own use, and who is told what it reports."""

    resources: dict[str, float]
    max_failures: int
    scratch: str
    on_event: Event | None = None

    def run(
        self, work: Work, architectures: Sequence[Architecture], done: Callable[[Architecture], object]
    ) -> dict[str, str]:
        """Do `work` for every architecture that is not `done` (false or None); reasons by name of those that failed for good.

        Raises MinitronError with the reasons, after the others have ended, when some broke off for a reason that may pass.
        """
        waiting = [architecture for architecture in architectures if not done(architecture)]
        if not waiting:
            return {}
        by_key = {trial_key(architecture): architecture for architecture in waiting}
        failures, broken = {}, {}
        for result in self._fit(work, by_key):
            name = str(by_key[(result.config or {})["candidate"]])
            if result.error is not None:
                broken[name] = _reason(str(result.error))
            elif "failed" in (result.metrics or {}):
                failures[name] = result.metrics["failed"]
        for architecture in waiting:
            if not done(architecture) and str(architecture) not in failures:
                broken.setdefault(str(architecture), "it was stopped")
        if broken:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in broken.items())
            raise MinitronError(
                f"{len(broken)} of {len(architectures)} candidates did not finish ({reasons})",
                "mend the cause and run again; what has finished is kept",
            )
        return failures

    def _fit(self, work: Work, by_key: dict[str, Architecture]) -> tune.ResultGrid:
        def trainable(config: dict[str, Any]) -> None:
            try:
                work(by_key[config["candidate"]], tune.report)
            except (NonFiniteError, InputError) as error:
                # It would fail the same way again: recorded, not raised, so that Tune does not retry it.
                tune.report({"failed": error.problem})

        # Tune's own experiment state is not what a run resumes from (restoring it would mean trusting pickles): results and
        # checkpoints of trials are, so its folder is thrown away.
        storage.remove(self.scratch)  # a killed run's
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        tuner = tune.Tuner(
            tune.with_resources(trainable, self.resources),
            param_space={"candidate": tune.grid_search(list(by_key))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(
                name="search",
                storage_path=self.scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=self.max_failures),
                callbacks=[_Events(self.on_event)] if self.on_event else [],
            ),
        )
        try:
            return tuner.fit()
        finally:
            with suppress(OSError):  # Tune may still be writing there; the next run removes the rest
                storage.remove(self.scratch)


def _reason(text: str) -> str:
    """The line of a traceback that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no reason given")


class _Events(Callback):
    """Hands on what trials report, in the driver."""

    def __init__(self, on_event: Event) -> None:
        self.on_event = on_event

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks with its experiment state, which is never restored

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.on_event(trial.config["candidate"], {k: v for k, v in result.items() if k in _REPORTED})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.on_event(trial.config["candidate"], {"failed": "its worker died too often"})


_REPORTED = (
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
