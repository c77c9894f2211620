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
from minitron_search.limits import LATENCIES
from minitron_search.pool import Pool
from minitron_search.sampling import sample
from minitron_search.search_task import SearchTask


def shortlist(
    context: Context, space: CandidateSpace, task: SearchTask, pool: Pool
) -> tuple[list[Architecture], dict[Architecture, dict[str, float]]]:
    """The candidates, and the milliseconds of every architecture that was timed, by the name of the limit.

    Raises InputError if no architecture keeps the limits, or if a point is slower than a limit on latency.
    """
    latency_limit = _LatencyLimits(context, space, task, pool)
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
        fastest = "".join(
            f", and the fastest takes {min(times[name] for times in milliseconds.values()):.3g} ms {LATENCIES[name][1]}"
            for name in latency_limit.latencies
            if milliseconds
        )
        keys = " or ".join(f"{space.key}.limits.{name}" for name in latency_limit.latencies)
        raise InputError(
            f"{space.key}.limits: no candidate keeps them: {len(milliseconds)} were timed{fastest}",
            f"raise {keys}, or widen {space.key}.space",
        )
    return candidates, milliseconds


class _LatencyLimits:
    """The limits on latency: measures architectures and removes those that are slower. Without a limit nothing is measured."""

    def __init__(self, context: Context, space: CandidateSpace, task: SearchTask, pool: Pool) -> None:
        self.key = space.key
        self.console = context.console
        self.pool = pool
        self.before_commit = task.before_commit
        self.milliseconds: dict[Architecture, dict[str, float]] = {}  # of every architecture that was timed
        self.latencies: dict[str, Latency] = {}
        self.limits: dict[str, float] = {}
        for name, (kind, _) in LATENCIES.items():
            if space.limits and (limit := getattr(space.limits, name)):
                self.limits[name] = limit
                self.latencies[name] = Latency(
                    origin=task.origin.folder,
                    dtype=task.origin.dtype,
                    batch=space.limits.batch,
                    context=space.limits.context,
                    folder=storage.join(context.locations.storage, "latency"),
                    threads=task.threads,
                    kind=kind,
                )

    def fast_enough(self, architectures: list[Architecture]) -> list[Architecture]:
        """The architectures that keep the limits, in the same order."""
        if not self.limits:
            return architectures
        self.pool.release_workers()  # they would take the resources, or slow down what is timed
        for name, latency in self.latencies.items():
            progress = self.console.counter(f"shapes timed {LATENCIES[name][1]}")
            measured = latency.measure(
                architectures,
                share=self.pool.share,
                progress=progress,
                look=self.pool.look,
                before_commit=self.before_commit,
            )
            for architecture, taken in measured.items():
                self.milliseconds.setdefault(architecture, {})[name] = taken
        return [a for a in architectures if not self._exceeded(a)]

    def _exceeded(self, architecture: Architecture) -> list[str]:
        times = self.milliseconds[architecture]
        return [name for name, limit in self.limits.items() if times[name] > limit]

    def check_points(self, points: list[Architecture]) -> None:
        """Raise InputError for a point that is slower than a limit."""
        slow = set(points) - set(self.fast_enough(points))
        for index, point in enumerate(points):
            if point in slow:
                name = self._exceeded(point)[0]
                raise InputError(
                    f"{self.key}.points.{index}: {point} takes {self.milliseconds[point][name]:.3g} ms {LATENCIES[name][1]}",
                    f"change the point, or raise {self.key}.limits.{name}",
                )
