"""The workers of a run, as stages use them: a group of processes that starts at its first use and serves all stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from minitron_platform.console import Console
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.tracking.restarts import Restart
from minitron_platform.workers.failures import WorkerFailures
from minitron_platform.workers.look import Look, no_look
from minitron_platform.workers.worker import Counted, Said, StatusChanged, Worker

if TYPE_CHECKING:
    from minitron_platform.workers.group import WorkerGroup

SEAT = (
    "minitron_worker"  # resource of a private Ray without GPUs: its group of workers waits while trials have the CPUs
)

Task = TypeVar("Task")
Result = TypeVar("Result")
OnEvent = Callable[[Any], None]


class Workers:
    """start_ray: starts Ray or joins a cluster, and returns the resources of workers there. computes_here: whether the work of
    one process is done in this one. scratch: folder that all nodes share, for Ray Train's own files.
    look: is called every few seconds while workers are awaited, and may raise. before_commit: gives the function that workers
    call before they write, for the work that begins now; see `Worker.before_commit`."""

    def __init__(
        self,
        console: Console,
        *,
        start_ray: Callable[[], ResolvedResources],
        computes_here: Callable[[], bool],
        scratch: str,
        look: Look = no_look,
        before_commit: Callable[[], Callable[[], None]] = lambda: _nothing,
    ) -> None:
        self.console = console
        self.look = look
        self.before_commit = before_commit
        self.start_ray = start_ray
        self.computes_here = computes_here
        self.scratch = scratch
        self._group: WorkerGroup | None = None
        self._store: Callable[[Restart], None] = _ignore
        self._waits_for_free = False  # whether a waiting group takes nothing from others

    def train(self, function: Callable[[Task, Worker], Result], task: Task, on_event: OnEvent) -> Result:
        """Call `function(task, worker)` in all workers together, in one process group; see `WorkerGroup.run`."""
        return self._run(function, task, on_event, everywhere=True)

    def compute(self, function: Callable[[Task, Worker], Result], task: Task, *, everywhere: bool = True) -> Result:
        """Call `function(task, worker)` where the run's models are computed: in all workers, or in the first one unless
        `everywhere`; in this process if it has the only device. Returns what the first worker returns.

        Raises what the function raises; on workers see `WorkerGroup.run`.
        """
        if self.computes_here():
            return function(task, Worker(0, 1, self.console, _ignore, before_commit=self.before_commit()))
        on_event = self._failure_handler(self._open().max_failures)
        return self._run(function, task, on_event, everywhere=everywhere)

    @contextmanager
    def storing(self, store: Callable[[Restart], None]) -> Iterator[None]:
        """Within the block, `store` is called with each failure of the workers in `compute`."""
        self._store = store
        try:
            yield
        finally:
            self._store = _ignore

    def ahead(self) -> None:
        """Start the workers without waiting for them."""
        self._open()

    def make_room(self) -> None:
        """Free the resources of the workers for others, until they are used again."""
        if not self._waits_for_free:
            self.close()

    def close(self) -> None:
        """End the workers."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def _run(
        self, function: Callable[[Task, Worker], Result], task: Task, on_event: OnEvent, *, everywhere: bool
    ) -> Result:
        return self._open().run(
            function,
            task,
            self._handler(on_event),
            everywhere=everywhere,
            look=self.look,
            before_commit=self.before_commit(),
        )

    def _open(self) -> WorkerGroup:
        """The group, which is started if there is none."""
        if self._group is not None and not self._group.is_open:
            self.close()
        if self._group is None:
            import ray

            from minitron_platform.workers.group import WorkerGroup

            resources = self.start_ray()
            self.console.status("starting workers")
            self._waits_for_free = (
                not resources.gpus_per_worker and ray.cluster_resources().get(SEAT, 0) >= resources.workers
            )
            self._group = WorkerGroup(
                resources.workers,
                {SEAT: 1.0} if self._waits_for_free else resources.worker_share,
                threads=max(1, int(resources.cpus_per_worker)),
                max_failures=resources.max_failures,
                scratch=self.scratch,
                least=resources.least_workers,
            )
        return self._group

    def _failure_handler(self, max_failures: int) -> OnEvent:
        """Shows and stores the failures of workers in one call."""
        failures = WorkerFailures(self.console, max_failures)

        def handle(event: Any) -> None:
            if failure := failures.event(event):
                self._store(failure)

        return handle

    def _handler(self, on_event: OnEvent) -> OnEvent:
        """Shows messages for the user, and gives other events to `on_event`."""
        counters: dict[str, Callable[[int, int], None]] = {}

        def handle(event: Any) -> None:
            match event:
                case Said(text):
                    self.console.say(text)
                case StatusChanged(text):
                    self.console.status(text)
                case Counted(done, total, unit):
                    if unit not in counters or done == 0:
                        counters[unit] = self.console.counter(unit)
                    counters[unit](done, total)
                case _:
                    on_event(event)

        return handle


def _ignore(event: object) -> None:
    pass


def _nothing() -> None:
    pass
