"""Ray Tune as a worker pool: one task for each of many candidates, as many at a time as the cluster has resources for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral, Real
from typing import Any

from minitron.architecture import Architecture
from minitron.arguments import check_type
from minitron.errors import InputError, MinitronError
from minitron_search.arguments import absolute_path
from minitron_search.events import Event, Report
from minitron_search.nodes import possible_nodes
from minitron_search.placement import max_concurrent_trials
from minitron_search.placement_groups import remove_orphaned_groups
from minitron_search.running_tune import RunningTune
from minitron_search.trial_store import trial_key

OnEvent = Callable[[Architecture, Event], None]
Work = Callable[[Architecture, Report], Any]


@dataclass(frozen=True)
class Pool:
    """How trials run on Ray, as many at a time as the cluster has resources for: more when a node joins, fewer when one leaves.

    `scratch` is a folder that all nodes share, for Ray's own files; it is deleted afterwards. A trial has `workers` processes
    (several run in Ray Train), and each requests `share`: amounts by Ray's resource names, "memory" in bytes. With `least` it
    has fewer, at least that many, while there is no room for all of them, and grows at its next checkpoint after there is,
    which changes results by rounding; on a private Ray, which is one node, it always has `workers`. A trial that raises or
    whose worker dies is restarted up to `max_failures` times, unless the same error would come again (a loss that is not
    finite, InputError, out of GPU memory). A trial that ran out of memory on a GPU that it shared runs again after the others,
    with a whole GPU. `on_event(architecture, event)` is called in a thread of this process with every event of a candidate (see
    `minitron_search.events`). `look()` is called every few seconds while trials are awaited; what it raises cancels them. A
    relative `scratch` is made absolute. Raises InputError for a
    field of the wrong type or out of range.
    """

    scratch: str
    share: Mapping[str, float] = field(default_factory=lambda: {"CPU": 1})
    workers: int = 1
    least: int | None = None
    max_failures: int = 3
    on_event: OnEvent | None = None
    look: Callable[[], None] = lambda: None
    _running: _Running | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scratch", absolute_path("scratch", self.scratch))
        check_type("share", self.share, Mapping)
        for name, amount in self.share.items():
            check_type(f"share.{name}", amount, Real)
            if amount < 0:
                raise InputError(f"share.{name}: {amount} is negative", "give 0 or more")
        check_type("workers", self.workers, Integral)
        check_type("max_failures", self.max_failures, Integral)
        if self.workers < 1:
            raise InputError(f"workers: {self.workers}", "give 1 or more")
        if self.least is not None:
            check_type("least", self.least, Integral)
            if not 1 <= self.least <= self.workers:
                raise InputError(f"least: {self.least}", f"give 1 to {self.workers}, the number of workers")
        if self.max_failures < 0:
            raise InputError(f"max_failures: {self.max_failures}", "give 0 or more")

    @contextmanager
    def open(self) -> Iterator[Pool]:
        """Within the block, workers that `run` has started are reused by the next `run`, until `release_workers`."""
        if self._running:
            yield self
            return
        running = _Running(self)
        try:
            yield replace(self, _running=running)
        except BaseException:
            running.close(wait=False)
            raise
        running.close()

    def release_workers(self) -> None:
        """Stop the workers that are kept for the next `run`, so that their resources are free until then."""
        if self._running:
            self._running.close()

    def single_process(self) -> Pool:
        """The same pool for work that runs in one process; with `workers` above 1 it does not share this pool's workers."""
        return (
            self
            if self.workers == 1
            else replace(self, scratch=f"{self.scratch}-single", workers=1, least=None, _running=None)
        )

    def _on_whole_gpus(self) -> Pool:
        return replace(self, scratch=f"{self.scratch}-whole", share={**self.share, "GPU": 1}, _running=None)

    def run(
        self,
        work: Work,
        architectures: Sequence[Architecture],
        done: Callable[[Architecture], object],
        *,
        refresh: Callable[[], object] = lambda: None,
    ) -> dict[Architecture, str]:
        """Run `work` for every architecture for which `done` returns false or None; returns the reason of each that failed.

        `refresh` is called before `done` is asked about all architectures, so that it may look at many of them at once.
        Raises StorageError if the storage cannot be used, which is not a candidate's fault, InputError if the cluster cannot
        hold even one trial, and MinitronError if Tune was stopped.
        """
        refresh()
        waiting = [architecture for architecture in architectures if not done(architecture)]
        if not waiting:
            return {}
        by_key = {trial_key(architecture): architecture for architecture in waiting}
        with self.open() as pool:
            assert pool._running
            work_by_key = {key: partial(work, architecture) for key, architecture in by_key.items()}
            tune = pool._running.tune()
            failed = tune.run(work_by_key, lambda key, event: self._forward(by_key[key], event), self._look)
            refresh()
            failures = {a: failed[key] for key, a in by_key.items() if key in failed and not done(a)}
            if crowded_out := [by_key[key] for key in by_key if key in tune.crowded_out]:
                pool.release_workers()  # kept workers still hold parts of the GPUs
                failures |= self._on_whole_gpus().run(work, crowded_out, done, refresh=refresh)
        stopped = [str(a) for a in waiting if not done(a) and a not in failures]
        if stopped:
            raise MinitronError(
                f"{len(stopped)} of {len(architectures)} candidates were stopped ({', '.join(stopped)})",
                "run again to resume; finished candidates are kept",
            )
        return failures

    def _forward(self, architecture: Architecture, event: Event) -> None:
        if self.on_event:
            self.on_event(architecture, event)

    def _look(self) -> None:
        remove_orphaned_groups()  # resources of several workers, if what has started them was on a lost node or cancelled
        self.look()

    def _at_once(self) -> int:
        """Number of trials that the nodes that are there now, and those that the autoscaler may start, can run."""
        return max_concurrent_trials(possible_nodes(), self.share, self.workers, self.least)

    def _check_room(self) -> None:
        if self._at_once():
            return
        nodes = possible_nodes()
        available = {name: sum(node.get(name, 0) for node in nodes) for name in self.share}
        raise InputError(
            f"a trial needs {self.least or self.workers} x ({_amounts(self.share)}), each on one node, and {len(nodes)} nodes "
            f"have {_amounts(available)} in all",
            "lower resources.workers_per_trial, cpus_per_trial or gpus_per_trial, or use a larger cluster",
        )


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())


class _Running:
    """The Tune run of an open pool: started when it is first needed, and again after it was closed."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.current: RunningTune | None = None

    def tune(self) -> RunningTune:
        if self.current is None:
            # A trial with several workers is a process that starts them: it requests almost nothing, which leaves the
            # resources to them. Tune does not count what they request, so that the number of trials is limited instead.
            resources = self.pool.share if self.pool.workers == 1 else {"memory": 1}
            self.pool._check_room()
            self.current = RunningTune(self.pool.scratch, resources, self.pool._at_once, self.pool.max_failures)
        return self.current

    def close(self, *, wait: bool = True) -> None:
        current = self.current
        self.current = None
        if current:
            current.close(wait=wait)
