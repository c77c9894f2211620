"""Ray Tune as a pool: one piece of work for each of many candidates, as many at a time as the cluster has room for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral, Real
from typing import Any

import ray

from minitron.architecture import Architecture
from minitron.errors import InputError, MinitronError
from minitron_search.arguments import check_type
from minitron_search.events import Event, Report
from minitron_search.placement import max_concurrent_trials
from minitron_search.running_tune import RunningTune
from minitron_search.trial_store import trial_key

OnEvent = Callable[[Architecture, Event], None]
Work = Callable[[Architecture, Report], Any]


@dataclass(frozen=True)
class Pool:
    """How work is carried out, as many pieces at a time as the cluster has room for.

    `scratch` is a folder that all nodes share, for Ray's own use; it is deleted. A piece has `workers` processes, more than
    one by Ray Train, and each takes `share`: Ray's names and amounts, "memory" in bytes. One that raises or whose worker dies
    is started again up to `max_failures` times, except where the same would happen again (a loss that is not finite,
    InputError, no room on the GPU). `on_event(architecture, event)` is called in a thread of this process with every event of
    a candidate (see `minitron_search.events`). Raises InputError for a field of the wrong type or out of range.
    """

    scratch: str
    share: Mapping[str, float] = field(default_factory=lambda: {"CPU": 1})
    workers: int = 1
    max_failures: int = 3
    on_event: OnEvent | None = None
    _running: _Running | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_type("scratch", self.scratch, str)
        check_type("share", self.share, Mapping)
        for name, amount in self.share.items():
            check_type(f"share.{name}", amount, Real)
            if amount < 0:
                raise InputError(f"share.{name}: {amount} is negative", "give 0 or more")
        check_type("workers", self.workers, Integral)
        check_type("max_failures", self.max_failures, Integral)
        if self.workers < 1:
            raise InputError(f"workers: {self.workers}", "give 1 or more")
        if self.max_failures < 0:
            raise InputError(f"max_failures: {self.max_failures}", "give 0 or more")

    @contextmanager
    def open(self) -> Iterator[Pool]:
        """The pool with workers that stay, from its first `run` in the block to the end of the block or `rest`."""
        if self._running:
            yield self
            return
        running = _Running(self)
        try:
            yield replace(self, _running=running)
        except BaseException:
            running.close(at_once=True)
            raise
        running.close()

    def rest(self) -> None:
        """Have the workers that stayed give up what they take of the cluster, until the next `run`."""
        if self._running:
            self._running.close()

    def alone(self) -> Pool:
        """The same for work of one process."""
        return self if self.workers == 1 else replace(self, scratch=f"{self.scratch}-alone", workers=1, _running=None)

    def run(
        self, work: Work, architectures: Sequence[Architecture], done: Callable[[Architecture], object]
    ) -> dict[Architecture, str]:
        """Do `work` for every architecture that is not `done` (false or None); returns the reasons of those that failed.

        Raises StorageError for storage that cannot be used, which is no candidate's fault, InputError where the cluster
        has no room for a single piece, and MinitronError when Tune was stopped.
        """
        waiting = [architecture for architecture in architectures if not done(architecture)]
        if not waiting:
            return {}
        by_key = {trial_key(architecture): architecture for architecture in waiting}
        with self.open() as pool:
            assert pool._running
            work_by_key = {key: partial(work, architecture) for key, architecture in by_key.items()}
            failed = pool._running.tune().do(work_by_key, lambda key, event: self._pass_on(by_key[key], event))
        failures = {a: failed[key] for key, a in by_key.items() if key in failed and not done(a)}
        stopped = [str(a) for a in waiting if not done(a) and a not in failures]
        if stopped:
            raise MinitronError(
                f"{len(stopped)} of {len(architectures)} candidates were stopped ({', '.join(stopped)})",
                "run again to go on; what has finished is kept",
            )
        return failures

    def _pass_on(self, architecture: Architecture, event: Event) -> None:
        if self.on_event:
            self.on_event(architecture, event)

    def _max_concurrent_trials(self) -> int:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if fitting := max_concurrent_trials(nodes, self.share, self.workers):
            return fitting
        available = {name: sum(node.get(name, 0) for node in nodes) for name in self.share}
        raise InputError(
            f"a trial takes {self.workers} x ({_amounts(self.share)}), each part on one node, and {len(nodes)} nodes have "
            f"{_amounts(available)} in all",
            "lower resources.workers_per_trial, cpus_per_trial or gpus_per_trial, or use a larger cluster",
        )


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())


class _Running:
    """What runs of a pool that is open."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.now: RunningTune | None = None

    def tune(self) -> RunningTune:
        if self.now is None:
            # Several workers are started from a process that takes next to nothing, or they would have no room beside it.
            # Tune does not see what they take: more trials than fit would wait for each other.
            resources = self.pool.share if self.pool.workers == 1 else {"memory": 1}
            self.now = RunningTune(
                self.pool.scratch, resources, self.pool._max_concurrent_trials(), self.pool.max_failures
            )
        return self.now

    def close(self, *, at_once: bool = False) -> None:
        now, self.now = self.now, None
        if now:
            now.close(at_once=at_once)
