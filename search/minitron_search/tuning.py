"""The search: a forward-only score for many candidates, a short distillation for those it leaves, and their ranking."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import pandas as pd

from minitron.architecture import Architecture
from minitron.errors import InputError, MinitronError
from minitron_search.failures import table
from minitron_search.halving import Halving, survivors
from minitron_search.pool import Pool
from minitron_search.ranking import SearchResult, rank, reason
from minitron_search.stability import stability
from minitron_search.trial import (
    SHAPE,
    SearchTask,
    drop_checkpoints,
    finished_result,
    run_trial,
    rung_result,
    score,
    trial_key,
    undistilled,
)
from minitron_search.workers import run_trial_on_workers

Stopped = dict[Architecture, int]


def search(
    task: SearchTask,
    architectures: Sequence[Architecture],
    *,
    forward_keep: int | None = None,
    pinned: Collection[Architecture] = (),
    halving: Halving | None = None,
    pool: Pool | None = None,
) -> SearchResult:
    """Distil the candidates briefly, as many at a time as the cluster has room for, and rank them by held-out KL.

    With `forward_keep` all are scored first by their KL before any training, and only that many, the lowest, are distilled,
    besides those in `pinned`. With `halving` the worse ones are stopped at rungs of `task`; all wait for the last there, so
    that who goes on does not depend on who was faster.

    What finished before is read back; an unfinished trial goes on from its checkpoint. What a trial takes, and how often it
    is started again, is up to `pool` (default: a CPU each, and a scratch folder among the trials); one that fails in the end
    is recorded with its reason and the search goes on without it.
    Needs Ray to be running. Raises InputError when `halving` has no rung to stop at or the cluster no room for one trial,
    StorageError for storage that cannot be used, such as a full disk, and MinitronError with a line for each candidate when
    none finished.
    """
    steps = task.config.steps
    cuts = halving.cuts(task.rungs, steps) if halving else []
    if halving and not cuts:
        raise InputError(
            f"halving: no rung of {list(task.rungs)} lies between {halving.grace} of {steps} steps and the end",
            "add a rung, or shorten the grace period",
        )
    with (pool or Pool(f"{task.folder.rstrip('/')}/tune")).open() as pool:
        return _search(task, list(architectures), forward_keep, pinned, halving, cuts, pool)


def _search(
    task: SearchTask,
    going: list[Architecture],
    forward_keep: int | None,
    pinned: Collection[Architecture],
    halving: Halving | None,
    cuts: list[int],
    pool: Pool,
) -> SearchResult:
    steps = task.config.steps
    trial = partial(run_trial, task)
    if pool.workers > 1:
        trial = partial(run_trial_on_workers, task, workers=pool.workers, share=pool.share, scratch=pool.scratch)
    failures: dict[str, str] = {}
    forward = None
    if forward_keep is not None:
        scores, failures = score_all(task, going, pool)
        going, forward = _best_undistilled(scores, going, forward_keep, pinned)
    stopped: Stopped = {}
    last = 0
    for cut in cuts:
        assert halving is not None
        failures |= pool.run(partial(trial, until=cut), going, partial(rung_result, task.folder, step=cut))
        if halving.due(_measured(task, going, last), _measured(task, going, cut)):
            going = _cut(task, going, cut, halving.keep, stopped)
        last = cut
    failures |= pool.run(trial, going, partial(finished_result, task))
    results = [result for a in going if (result := finished_result(task, a)) is not None]
    if not results:
        raise MinitronError(f"no candidate of the search finished{table(failures)}", "mend the cause and run again")
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


def score_all(
    task: SearchTask, architectures: Sequence[Architecture], pool: Pool
) -> tuple[dict[Architecture, float], dict[str, str]]:
    """Exact held-out KL of every architecture before any training, and reasons by name of those that failed; known ones are
    read back. One process scores one, whatever the pool's `workers`."""
    failures = pool.alone().run(partial(score, task), architectures, partial(undistilled, task.folder))
    scores = {a: found["kl"] for a in architectures if (found := undistilled(task.folder, a)) is not None}
    return scores, failures


def _best_undistilled(
    scores: dict[Architecture, float],
    architectures: list[Architecture],
    keep: int,
    pinned: Collection[Architecture],
) -> tuple[list[Architecture], pd.DataFrame]:
    """Those that are distilled, in their order, and the scores of all, lowest first."""
    ordered = sorted(scores, key=lambda a: scores[a])
    chosen = {*ordered[:keep], *(a for a in scores if a in pinned)}
    rows = [{**_shape(a), "kl_undistilled": scores[a], "distilled": a in chosen} for a in ordered]
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
