"""The search: a forward-only score for many candidates, a short distillation for the best of them, and their ranking."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from numbers import Integral

from minitron.architecture import Architecture
from minitron.errors import InputError, MinitronError
from minitron_search.arguments import check_type, check_types
from minitron_search.distributed_trial import run_trial_on_workers
from minitron_search.failures import table
from minitron_search.halving import Halving, survivors
from minitron_search.pool import Pool
from minitron_search.ranking import rank, reason, winner_of
from minitron_search.results import ScoredCandidate, SearchResult, StoppedCandidate
from minitron_search.stability import stability
from minitron_search.trial import SearchTask, finished_result, run_trial, score
from minitron_search.trial_store import drop_checkpoints, forward_score, rung_result

Stopped = dict[Architecture, int]  # the rung, in steps, that stopped each


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
    that which candidates continue does not depend on which were faster.

    What finished before is read back; an unfinished trial resumes from its checkpoint. What a trial takes, and how often it
    is started again, is up to `pool` (default: a CPU each, and a scratch folder among the trials); one that fails in the end
    is recorded with its reason and the search continues without it.
    Needs Ray to be running. Raises InputError for an argument of the wrong type, when `halving` has no rung to stop at or the
    cluster no room for one trial, StorageError for storage that cannot be used, such as a full disk, and MinitronError with a
    line for each candidate when none finished.
    """
    _check(task, architectures, forward_keep, pinned, halving, pool)
    steps = task.config.steps
    cuts = halving.cuts(task.rungs, steps) if halving else []
    if halving and not cuts:
        raise InputError(
            f"halving: no rung of {list(task.rungs)} lies between {halving.grace} of {steps} steps and the end",
            "add a rung, or shorten the grace period",
        )
    with (pool or Pool(f"{task.folder.rstrip('/')}/tune")).open() as open_pool:
        return _search(task, list(architectures), forward_keep, pinned, halving, cuts, open_pool)


def _search(
    task: SearchTask,
    remaining: list[Architecture],
    forward_keep: int | None,
    pinned: Collection[Architecture],
    halving: Halving | None,
    cuts: Sequence[int],
    pool: Pool,
) -> SearchResult:
    steps = task.config.steps
    trial = partial(run_trial, task)
    if pool.workers > 1:
        trial = partial(run_trial_on_workers, task, workers=pool.workers, share=pool.share, scratch=pool.scratch)
    failures: dict[Architecture, str] = {}
    forward = None
    if forward_keep is not None:
        scores, failures = score_all(task, remaining, pool)
        forward = _ordered_scores(scores, forward_keep, pinned)
        distilled = {candidate.architecture for candidate in forward if candidate.distilled}
        remaining = [architecture for architecture in remaining if architecture in distilled]
    stopped: Stopped = {}
    last = 0
    for cut in cuts:
        assert halving is not None
        failures |= pool.run(partial(trial, until=cut), remaining, partial(rung_result, task.folder, step=cut))
        if halving.due(_measured(task, remaining, last), _measured(task, remaining, cut)):
            remaining = _cut(task, remaining, cut, halving.keep, stopped)
        last = cut
    failures |= pool.run(trial, remaining, partial(finished_result, task))
    results = [result for a in remaining if (result := finished_result(task, a)) is not None]
    if not results:
        raise MinitronError(f"no candidate of the search finished{table(failures)}", "fix the cause and run again")
    ranking = rank(results, task.materials.open_rows("heldout").seq_length)
    return SearchResult(
        ranking=ranking,
        winner=winner_of(ranking).architecture,
        reason=reason(ranking),
        failures=failures,
        stopped=_stopped_candidates(task, stopped),
        forward=forward,
        stability=stability(results, task.rungs, halving.keep if halving else Halving.keep),
        saved=_saved(len(results), stopped, steps),
    )


def score_all(
    task: SearchTask, architectures: Sequence[Architecture], pool: Pool
) -> tuple[dict[Architecture, float], dict[Architecture, str]]:
    """Exact held-out KL of every architecture before any training, and the reasons of those that failed; known ones are read
    back. One process scores one, whatever the pool's `workers`. Raises InputError for an argument of the wrong type."""
    _check(task, architectures, pool=pool, may_be_empty=True)
    failures = pool.alone().run(partial(score, task), architectures, partial(forward_score, task.folder))
    known = {a: measured.kl for a in architectures if (measured := forward_score(task.folder, a)) is not None}
    return known, failures


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
        raise InputError("architectures: there are none", "give at least one candidate")
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
    """All that were scored, lowest KL first, and whether they are among the best `keep` or pinned."""
    ordered = sorted(scores, key=lambda a: scores[a])
    chosen = {*ordered[:keep], *(a for a in scores if a in pinned)}
    return [ScoredCandidate(a, kl_undistilled=scores[a], distilled=a in chosen) for a in ordered]


def _cut(
    task: SearchTask, remaining: list[Architecture], cut: int, keep: float, stopped: Stopped
) -> list[Architecture]:
    """Those that continue beyond a rung, in their order; the others are added to `stopped` and lose their checkpoints."""
    reached = _measured(task, remaining, cut)
    best = set(survivors(reached, keep))
    for architecture in remaining:
        if architecture in reached.keys() - best:
            stopped[architecture] = cut
            drop_checkpoints(task.folder, architecture)
    return [architecture for architecture in remaining if architecture in best]


def _measured(task: SearchTask, remaining: list[Architecture], step: int) -> dict[Architecture, float]:
    """Held-out KL after this many steps, for candidates measured then."""
    measured = {a: rung_result(task.folder, a, step) if step else forward_score(task.folder, a) for a in remaining}
    return {a: result.kl for a, result in measured.items() if result is not None}


def _stopped_candidates(task: SearchTask, stopped: Stopped) -> list[StoppedCandidate]:
    candidates = []
    for architecture, cut in stopped.items():
        before = forward_score(task.folder, architecture)
        at_rung = rung_result(task.folder, architecture, cut)
        assert before is not None
        assert at_rung is not None
        candidates.append(StoppedCandidate(architecture, kl_undistilled=before.kl, step=cut, kl=at_rung.kl))
    return sorted(candidates, key=lambda candidate: (-candidate.step, candidate.kl))


def _saved(finished: int, stopped: Stopped, steps: int) -> float:
    trained = finished * steps + sum(stopped.values())
    return 1 - trained / ((finished + len(stopped)) * steps)
