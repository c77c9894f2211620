"""The search: a forward-only score for many candidates, a short distillation of the best, and their ranking."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from numbers import Integral

from minitron.architecture import Architecture
from minitron.arguments import check_type, check_types
from minitron.errors import InputError, MinitronError
from minitron_search.distributed_trial import run_trial_on_workers
from minitron_search.failures import table
from minitron_search.halving import Halving, survivors
from minitron_search.pool import Pool
from minitron_search.ranking import rank, reason, winner_of
from minitron_search.results import ScoredCandidate, SearchResult, StoppedCandidate
from minitron_search.search_task import SearchTask
from minitron_search.stability import stability
from minitron_search.stored_trials import StoredTrials
from minitron_search.trial import run_trial, score
from minitron_search.trial_store import drop_checkpoints

Stopped = dict[Architecture, int]  # the rung, in steps, at which each candidate was stopped


def search(
    task: SearchTask,
    architectures: Sequence[Architecture],
    *,
    forward_keep: int | None = None,
    pinned: Collection[Architecture] = (),
    halving: Halving | None = None,
    pool: Pool | None = None,
) -> SearchResult:
    """Distil the candidates briefly, as many at a time as the cluster has resources for, and rank them by held-out KL.

    With `forward_keep` all candidates are scored by their KL before any training, and only that many with the lowest KL are
    distilled, and those in `pinned`. With `halving` the worse candidates are stopped at rungs of `task`; there every trial
    waits for the last one, so that the choice does not depend on which was faster.

    Results of finished trials are read from `task.folder`; an unfinished trial resumes from its checkpoint. `pool` sets the
    resources of a trial and how often it is restarted (default: one CPU each, and a scratch folder below `task.folder`). A
    trial that fails for good is recorded with its reason, and the search continues without it.

    Needs Ray to be running. Raises InputError for an argument of the wrong type, if `halving` has no rung at which to stop
    candidates, and if the cluster cannot hold even one trial; StorageError if the storage cannot be used, for example because
    the disk is full; and MinitronError with a line per candidate if none finished.
    """
    _check(task, architectures, forward_keep, pinned, halving, pool)
    steps = task.config.steps
    stop_rungs = halving.stop_rungs(task.rungs, steps) if halving else []
    if halving and not stop_rungs:
        raise InputError(
            f"halving: no rung of {list(task.rungs)} lies between {halving.grace} of {steps} steps and the end",
            "add a rung, or shorten the grace period",
        )
    with (pool or Pool(f"{task.folder.rstrip('/')}/tune")).open() as open_pool:
        return _search(task, list(architectures), forward_keep, pinned, halving, stop_rungs, open_pool)


def _search(
    task: SearchTask,
    remaining: list[Architecture],
    forward_keep: int | None,
    pinned: Collection[Architecture],
    halving: Halving | None,
    stop_rungs: Sequence[int],
    pool: Pool,
) -> SearchResult:
    steps = task.config.steps
    trial = partial(run_trial, task)
    if pool.workers > 1:
        trial = partial(
            run_trial_on_workers,
            task,
            workers=pool.workers,
            least=pool.least,
            share=pool.share,
            scratch=pool.scratch,
        )
    stored = StoredTrials(task.folder)
    failures: dict[Architecture, str] = {}
    forward: list[ScoredCandidate] | None = None
    if forward_keep is not None:
        scores, failures = score_all(task, remaining, pool)
        forward = _ordered_scores(scores, forward_keep, pinned)
        distilled = {candidate.architecture for candidate in forward if candidate.distilled}
        remaining = [architecture for architecture in remaining if architecture in distilled]
    stopped: Stopped = {}
    last = 0
    for rung in stop_rungs:
        assert halving is not None
        measured = partial(_is_measured, stored, rung)
        failures |= pool.run(partial(trial, until=rung), remaining, measured, refresh=stored.refresh)
        if halving.should_stop(stored.rung_kl(remaining, last), stored.rung_kl(remaining, rung)):
            task.before_commit()
            remaining = _stop_worse(stored, remaining, rung, halving.keep, stopped)
        last = rung
    finished = partial(_is_finished, stored, task)
    failures |= pool.run(trial, remaining, finished, refresh=stored.refresh)
    results = list(stored.results(remaining, task.rungs).values())
    if not results:
        raise MinitronError(f"no candidate of the search finished{table(failures)}", "fix the cause and run again")
    ranking = rank(results, task.materials.open_rows("heldout").seq_length)
    return SearchResult(
        ranking=ranking,
        winner=winner_of(ranking).architecture,
        reason=reason(ranking),
        failures=failures,
        stopped=_stopped_candidates(stored, stopped),
        forward=forward,
        stability=stability(results, task.rungs, halving.keep if halving else Halving.keep),
        saved=_saved(len(results), stopped, steps),
    )


def score_all(
    task: SearchTask, architectures: Sequence[Architecture], pool: Pool
) -> tuple[dict[Architecture, float], dict[Architecture, str]]:
    """Exact held-out KL of every architecture before any training, in nats per token, and the reason of each that failed.

    Stored scores are read instead of measured. Each architecture is scored in one process, also if the pool has several
    `workers` per trial. Raises InputError for an argument of the wrong type.
    """
    _check(task, architectures, pool=pool, may_be_empty=True)
    stored = StoredTrials(task.folder)
    measured = partial(_is_measured, stored, 0)
    failures = pool.single_process().run(partial(score, task), architectures, measured, refresh=stored.refresh)
    return stored.rung_kl(architectures, 0), failures


def _check(
    task: SearchTask,
    architectures: Sequence[Architecture],
    forward_keep: int | None = None,
    pinned: Collection[Architecture] = (),
    halving: Halving | None = None,
    pool: Pool | None = None,
    may_be_empty: bool = False,
) -> None:
    check_type("task", task, SearchTask)
    check_types("architectures", architectures, Architecture)
    if not architectures and not may_be_empty:
        raise InputError("architectures: the list is empty", "give at least one candidate")
    if forward_keep is not None:
        check_type("forward_keep", forward_keep, Integral)
        if forward_keep < 1:
            raise InputError(f"forward_keep: {forward_keep}", "give 1 or more")
    check_types("pinned", pinned, Architecture)
    if halving is not None:
        check_type("halving", halving, Halving)
    if pool is not None:
        check_type("pool", pool, Pool)


def _ordered_scores(
    scores: dict[Architecture, float], keep: int, pinned: Collection[Architecture]
) -> list[ScoredCandidate]:
    """All scored candidates, lowest KL first; to be distilled are the best `keep` and the pinned ones."""
    ordered = sorted(scores, key=lambda a: scores[a])
    chosen = {*ordered[:keep], *(a for a in scores if a in pinned)}
    return [ScoredCandidate(a, kl_undistilled=scores[a], distilled=a in chosen) for a in ordered]


def _is_measured(stored: StoredTrials, step: int, architecture: Architecture) -> bool:
    return bool(stored.rung_kl([architecture], step))


def _is_finished(stored: StoredTrials, task: SearchTask, architecture: Architecture) -> bool:
    return bool(stored.results([architecture], task.rungs))


def _stop_worse(
    stored: StoredTrials, remaining: list[Architecture], rung: int, keep: float, stopped: Stopped
) -> list[Architecture]:
    """The candidates that continue after a rung, in the same order; the others are added to `stopped` and their checkpoints
    deleted."""
    measured = stored.rung_kl(remaining, rung)
    best = set(survivors(measured, keep))
    for architecture in remaining:
        if architecture in measured.keys() - best:
            stopped[architecture] = rung
            drop_checkpoints(stored.folder, architecture)
    return [architecture for architecture in remaining if architecture in best]


def _stopped_candidates(stored: StoredTrials, stopped: Stopped) -> list[StoppedCandidate]:
    before = stored.rung_kl(stopped, 0)
    candidates = [
        StoppedCandidate(a, kl_undistilled=before[a], step=rung, kl=stored.rung_kl([a], rung)[a])
        for a, rung in stopped.items()
    ]
    return sorted(candidates, key=lambda candidate: (-candidate.step, candidate.kl))


def _saved(finished: int, stopped: Stopped, steps: int) -> float:
    """Share of the training steps that stopping candidates has saved."""
    trained = finished * steps + sum(stopped.values())
    return 1 - trained / ((finished + len(stopped)) * steps)
