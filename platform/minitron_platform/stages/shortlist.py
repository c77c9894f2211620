"""The candidates of a search: the architectures of its space, or a sample of them, that keep the limit on latency."""

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
    """The candidates, and the milliseconds to the first token of every architecture that was timed.

    Raises InputError if no architecture keeps the limits, or if a point is slower than the limit on latency.
    """
    latency_limit = _LatencyLimit(context, space, task, pool)
    latency_limit.check_points(space.points)
    if space.sampled is None:
        candidates = latency_limit.fast_enough(space.candidates)
    else:
        sampler = context.recipe.search.sampler
        assert sampler is not None
        progress = context.console.counter(f"of {sampler.candidates:,} candidates scored undistilled")
        scored: dict[Architecture, float] = {}

        def score(proposed: list[Architecture]) -> dict[Architecture, float]:
            fast = latency_limit.fast_enough(proposed)
            scores, _ = score_all(task, fast, pool)  # the search reports the failures later
            new = {architecture: scores.get(architecture, math.nan) for architecture in fast}
            scored.update(new)
            progress(len(scored), sampler.candidates)
            return new

        candidates = sample(score, space.sampled, sampler.candidates, seed=sampler.seed, points=space.points)
    milliseconds = latency_limit.milliseconds
    if not candidates:
        fastest = f", and the fastest takes {min(milliseconds.values()):.3g} ms" if milliseconds else ""
        raise InputError(
            f"{space.key}.limits: no candidate keeps them: {len(milliseconds)} were timed{fastest}",
            f"raise {space.key}.limits.latency_ms, or widen {space.key}.space",
        )
    return candidates, milliseconds


class _LatencyLimit:
    """The limit on the time to the first token: measures architectures and removes those that are slower. Without a limit
    nothing is measured."""

    def __init__(self, context: Context, space: CandidateSpace, task: SearchTask, pool: Pool) -> None:
        self.key = space.key
        self.limits = space.limits
        self.console = context.console
        self.pool = pool
        self.milliseconds: dict[Architecture, float] = {}  # of every architecture that was timed
        if self.limits and self.limits.latency_ms:
            self.latency = Latency(
                origin=task.origin.folder,
                dtype=task.origin.dtype,
                batch=self.limits.batch,
                context=self.limits.context,
                folder=storage.join(context.locations.storage, "latency"),
                threads=task.threads,
            )

    def fast_enough(self, architectures: list[Architecture]) -> list[Architecture]:
        """The architectures that keep the limit, in the same order."""
        if self.limits is None or self.limits.latency_ms is None:
            return architectures
        progress = self.console.counter("shapes timed")
        self.pool.release_workers()  # they would take the resources, or slow down what is timed
        self.milliseconds |= self.latency.measure(architectures, share=self.pool.share, progress=progress)
        return [a for a in architectures if self.milliseconds[a] <= self.limits.latency_ms]

    def check_points(self, points: list[Architecture]) -> None:
        """Raise InputError for a point that is slower than the limit."""
        slow = set(points) - set(self.fast_enough(points))
        for index, point in enumerate(points):
            if point in slow:
                raise InputError(
                    f"{self.key}.points.{index}: {point} takes {self.milliseconds[point]:.3g} ms to its first token",
                    f"change the point, or raise {self.key}.limits.latency_ms",
                )
