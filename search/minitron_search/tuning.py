"""The search: a forward-only score for many candidates, a short distillation for those it leaves, and their ranking."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial

import pandas as pd

from minitron.architecture import Architecture
from minitron.errors import InputError, MinitronError
from minitron_search.halving import Halving, survivors
from minitron_search.pool import Event, Pool
from minitron_search.ranking import SHAPE, SearchResult, rank, reason
from minitron_search.stability import stability
from minitron_search.trial import (
    SearchTask,
    drop_checkpoints,
    finished_result,
    run_trial,
    rung_result,
    score,
    trial_key,
    undistilled,
)

Stopped = dict[Architecture, int]


def search(
    task: SearchTask,
    architectures: Sequence[Architecture],
    *,
    forward_keep: int | None = None,
    pinned: Collection[Architecture] = (),
    halving: Halving | None = None,
    cpus_per_trial: float = 1,
    gpus_per_trial: float = 0,
    memory_per_trial: int = 0,
    max_failures: int = 3,
    scratch: str | None = None,
    on_event: Event | None = None,
) -> SearchResult:
    """Distil the candidates briefly, as many at a time as the cluster has room for, and rank them by held-out KL.

    With `forward_keep` all are scored first by their KL before any training, and only that many, the lowest, are distilled,
    besides those in `pinned`. With `halving` the worse ones are stopped at rungs of `task`; all wait for the last there, so
    that who goes on does not depend on who was faster.

    What finished before is read back; an unfinished trial goes on from its checkpoint. A trial whose worker dies is started
    again up to `max_failures` times; one whose loss is not finite is recorded with its reason.
    `scratch` is a folder that all nodes share for Tune's own use (default: in the trials' folder); it is deleted.
    `memory_per_trial` (bytes) keeps more from running at once than fit. `on_event(key, metrics)` is called in this process
    with what each trial reports; key is `trial_key(architecture)`.
    Needs Ray to be running. Raises InputError when `halving` has no rung to stop at, MinitronError with the reasons when a
    trial broke off for a reason that may pass (a full disk, workers that were killed), after the others have finished, and
    when no candidate finished.
    """
    steps = task.config.steps
    cuts = halving.cuts(task.rungs, steps) if halving else []
    if halving and not cuts:
        raise InputError(
            f"halving: no rung of {list(task.rungs)} lies between {halving.grace:g} of {steps} steps and the end",
            "add a rung, or shorten the grace period",
        )
    wanted = {"cpu": cpus_per_trial, "gpu": gpus_per_trial, "memory": memory_per_trial}
    pool = Pool(
        resources={name: amount for name, amount in wanted.items() if amount},
        max_failures=max_failures,
        scratch=scratch or f"{task.folder.rstrip('/')}/tune",
        on_event=on_event,
    )
    failures: dict[str, str] = {}
    going, forward = list(architectures), None
    if forward_keep is not None:
        failures |= pool.run(partial(score, task), going, partial(undistilled, task.folder))
        going, forward = _best_undistilled(task, going, forward_keep, pinned)
    stopped: Stopped = {}
    last = 0
    for cut in cuts:
        assert halving is not None
        failures |= pool.run(partial(run_trial, task, until=cut), going, partial(rung_result, task.folder, step=cut))
        if halving.due(_measured(task, going, last), _measured(task, going, cut)):
            going = _cut(task, going, cut, halving.keep, stopped)
        last = cut
    failures |= pool.run(partial(run_trial, task), going, partial(finished_result, task))
    results = [result for a in going if (result := finished_result(task, a)) is not None]
    if not results:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise MinitronError(f"no candidate of the search finished: {reasons}", "mend the cause and run again")
    ranking = rank(results, task.materials.open_rows("heldout").seq_length)
    name = ranking[ranking["winner"]].iloc[0]["architecture"]
    return SearchResult(
        ranking=ranking,
        winner=next(a for a in going if str(a) == name),
        reason=reason(ranking),
        failures=failures,
        stopped=_stopped_table(task, stopped),
        forward=forward,
        stability=stability(results, task.rungs, halving.keep if halving else Halving.keep),
        saved=_saved(len(results), stopped, steps),
    )


def score_all(task: SearchTask, architectures: Sequence[Architecture], pool: Pool) -> dict[Architecture, float]:
    """Exact held-out KL of every architecture before any training, NaN where it failed; known ones are read back."""
    pool.run(partial(score, task), architectures, partial(undistilled, task.folder))
    found = {a: undistilled(task.folder, a) for a in architectures}
    return {a: value["kl"] if value is not None else math.nan for a, value in found.items()}


def _best_undistilled(
    task: SearchTask, architectures: list[Architecture], keep: int, pinned: Collection[Architecture]
) -> tuple[list[Architecture], pd.DataFrame]:
    """Those that are distilled, in their order, and the scores of all, lowest first."""
    scores = {a: found for a in architectures if (found := undistilled(task.folder, a)) is not None}
    ordered = sorted(scores, key=lambda a: scores[a]["kl"])
    chosen = {*ordered[:keep], *(a for a in scores if a in pinned)}
    rows = [{**_shape(a), "kl_undistilled": scores[a]["kl"], "distilled": a in chosen} for a in ordered]
    return [a for a in architectures if a in chosen], pd.DataFrame(rows)


def _cut(task: SearchTask, going: list[Architecture], cut: int, keep: float, stopped: Stopped) -> list[Architecture]:
    """Those that go on beyond a rung, in their order; the others are added to `stopped` and lose their checkpoints."""
    reached = _measured(task, going, cut)
    best = set(survivors(reached, keep))
    for architecture in going:
        if trial_key(architecture) in reached.keys() - best:
            stopped[architecture] = cut
            drop_checkpoints(task.folder, architecture)
    return [architecture for architecture in going if trial_key(architecture) in best]


def _measured(task: SearchTask, going: list[Architecture], step: int) -> dict[str, float]:
    """Held-out KL by `trial_key` after so many steps, of those of which it is known."""
    found = {a: rung_result(task.folder, a, step) if step else undistilled(task.folder, a) for a in going}
    return {trial_key(a): result["kl"] for a, result in found.items() if result is not None}


def _stopped_table(task: SearchTask, stopped: Stopped) -> pd.DataFrame:
    rows = []
    for architecture, cut in stopped.items():
        before, at_rung = undistilled(task.folder, architecture), rung_result(task.folder, architecture, cut)
        assert before is not None
        assert at_rung is not None
        rows.append({**_shape(architecture), "kl_undistilled": before["kl"], "step": cut, "kl": at_rung["kl"]})
    rows.sort(key=lambda row: (-row["step"], row["kl"]))
    return pd.DataFrame(rows, columns=["architecture", *SHAPE, "parameters", "kl_undistilled", "step", "kl"])


def _shape(architecture: Architecture) -> dict[str, object]:
    shape = {name: getattr(architecture, name) for name in SHAPE}
    return {"architecture": str(architecture), **shape, "parameters": architecture.num_parameters}


def _saved(finished: int, stopped: Stopped, steps: int) -> float:
    trained = finished * steps + sum(stopped.values())
    return 1 - trained / ((finished + len(stopped)) * steps)
