"""Ray Tune gives every candidate its short distillation."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
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
from minitron_search.ranking import SearchResult, rank, reason
from minitron_search.trial import SearchTask, run_trial, trial_key, trial_result

Event = Callable[[str, dict[str, Any]], None]


def search(
    task: SearchTask,
    architectures: Sequence[Architecture],
    *,
    cpus_per_trial: float = 1,
    gpus_per_trial: float = 0,
    memory_per_trial: int = 0,
    max_failures: int = 3,
    scratch: str | None = None,
    on_event: Event | None = None,
) -> SearchResult:
    """Distil every candidate briefly, as many at a time as the cluster has room for, and rank them by held-out KL.

    Trials that finished before are read back; an unfinished one goes on from its checkpoint. A trial whose worker dies is
    started again up to `max_failures` times; one whose loss is not finite is recorded with its reason.
    `scratch` is a folder that all nodes share for Tune's own use (default: in the trials' folder); it is deleted.
    `memory_per_trial` (bytes) keeps more from running at once than fit. `on_event(key, metrics)` is called in this process
    with what each trial reports; key is `trial_key(architecture)`.
    Needs Ray to be running. Raises MinitronError with the reasons when a trial broke off for a reason that may pass (a
    full disk, workers that were killed), after the others have finished, and when no candidate finished.
    """
    waiting = [a for a in architectures if trial_result(task.folder, a) is None]
    resources = {"cpu": cpus_per_trial, "gpu": gpus_per_trial, "memory": memory_per_trial}
    place = scratch or storage.join(task.folder, "tune")
    wanted = {name: amount for name, amount in resources.items() if amount}
    failures, broken = _run(task, waiting, wanted, max_failures, place, on_event) if waiting else ({}, {})
    if broken:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in broken.items())
        raise MinitronError(
            f"{len(broken)} of {len(architectures)} candidates did not finish ({reasons})",
            "mend the cause and run again; what has finished is kept",
        )
    results = [result for a in architectures if (result := trial_result(task.folder, a)) is not None]
    if not results:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise MinitronError(f"no candidate of the search finished: {reasons}", "mend the cause and run again")
    ranking = rank(results, task.materials.open_rows("heldout").seq_length)
    winner = next(a for a in architectures if str(a) == ranking[ranking["winner"]].iloc[0]["architecture"])
    return SearchResult(ranking, winner, reason(ranking), failures)


def _run(
    task: SearchTask,
    waiting: list[Architecture],
    resources: dict[str, float],
    max_failures: int,
    scratch: str,
    on_event: Event | None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Reasons by candidate: of those that failed for good, and of those that broke off."""
    by_key = {trial_key(a): a for a in waiting}

    def trainable(config: dict[str, Any]) -> None:
        architecture = by_key[config["candidate"]]
        try:
            run_trial(task, architecture, tune.report)
        except (NonFiniteError, InputError) as error:
            # It would fail the same way again: recorded, not raised, so that Tune does not retry it.
            tune.report({"failed": error.problem})

    # Tune's own experiment state is not what a run resumes from (restoring it would mean trusting pickles): results and
    # checkpoints of trials are, so its folder is thrown away.
    storage.remove(scratch)  # a killed run's
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    tuner = tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space={"candidate": tune.grid_search(list(by_key))},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(
            name="search",
            storage_path=scratch,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=max_failures),
            callbacks=[_Events(on_event)] if on_event else [],
        ),
    )
    try:
        grid = tuner.fit()
    finally:
        with suppress(OSError):  # Tune may still be writing there; the next run removes the rest
            storage.remove(scratch)
    failures, broken = {}, {}
    for result in grid:
        name = str(by_key[(result.config or {})["candidate"]])
        if result.error is not None:
            broken[name] = _reason(str(result.error))
        elif "failed" in (result.metrics or {}):
            failures[name] = result.metrics["failed"]
    for architecture in waiting:
        name = str(architecture)
        if trial_result(task.folder, architecture) is None and name not in failures:
            broken.setdefault(name, "it was stopped")
    return failures, broken


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
    "kl",
    "loss",
    "train_loss",
    "train_kl",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "failed",
)
