"""Which architectures a search looks at: those of its space, or a sample of it, that are fast enough where it matters."""

from __future__ import annotations

import math

from minitron import storage
from minitron.architecture import Architecture
from minitron.errors import InputError
from minitron_platform.recipes.candidates import CandidateSpace
from minitron_platform.stages.context import Context
from minitron_search.architecture_search import score_all
from minitron_search.latency import Latency
from minitron_search.pool import Pool
from minitron_search.sampling import sample
from minitron_search.search_task import SearchTask


def shortlist(
    context: Context, space: CandidateSpace, task: SearchTask, pool: Pool
) -> tuple[list[Architecture], dict[Architecture, float]]:
    """The candidates, and the milliseconds to the first token of those that were timed.

    Raises InputError where none keeps to the limits, or a point does not keep to the measured one.
    """
    timed = _Timed(context, space, task, pool)
    timed.check(space.points)
    if space.sampled is None:
        found = timed.fast(space.candidates)
    else:
        sampler = context.recipe.search.sampler
        assert sampler is not None
        count = context.console.counter(f"of {sampler.candidates:,} candidates scored undistilled")
        scored: dict[Architecture, float] = {}

        def score(proposed: list[Architecture]) -> dict[Architecture, float]:
            fast = timed.fast(proposed)
            known, _ = score_all(task, fast, pool)  # the search itself reports those that failed
            new = {a: known.get(a, math.nan) for a in fast}
            scored.update(new)
            count(len(scored), sampler.candidates)
            return new

        found = sample(score, space.sampled, sampler.candidates, seed=sampler.seed, points=space.points)
    if not found:
        least = f", and the fastest takes {min(timed.milliseconds.values()):.3g} ms" if timed.milliseconds else ""
        raise InputError(
            f"{space.key}.limits: no candidate keeps to them: {len(timed.milliseconds)} were timed{least}",
            f"raise {space.key}.limits.latency_ms, or widen {space.key}.space",
        )
    return found, timed.milliseconds


class _Timed:
    """Leaves out what takes longer to its first tokens than is allowed; measures nothing where that is not limited."""

    def __init__(self, context: Context, space: CandidateSpace, task: SearchTask, pool: Pool) -> None:
        self.key = space.key
        self.limits = space.limits
        self.console = context.console
        self.pool = pool
        self.milliseconds: dict[Architecture, float] = {}
        if self.limits and self.limits.latency_ms:
            self.latency = Latency(
                origin=task.origin.folder,
                dtype=task.origin.dtype,
                batch=self.limits.batch,
                context=self.limits.context,
                folder=storage.join(context.locations.storage, "latency"),
                threads=task.threads,
            )

    def fast(self, architectures: list[Architecture]) -> list[Architecture]:
        if self.limits is None or self.limits.latency_ms is None:
            return architectures
        progress = self.console.counter("shapes timed")
        self.pool.release_workers()  # for room, and so that nothing else runs during the timing
        self.milliseconds |= self.latency.measure(architectures, share=self.pool.share, progress=progress)
        return [a for a in architectures if self.milliseconds[a] <= self.limits.latency_ms]

    def check(self, points: list[Architecture]) -> None:
        slow = set(points) - set(self.fast(points))
        for index, point in enumerate(points):
            if point in slow:
                raise InputError(
                    f"{self.key}.points.{index}: {point} takes {self.milliseconds[point]:.3g} ms to its first token",
                    f"change the point, or raise {self.key}.limits.latency_ms",
                )
