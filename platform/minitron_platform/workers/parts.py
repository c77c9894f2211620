"""Independent parts of a work as tasks of Ray: each runs wherever a CPU is free, and again if its worker dies."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_list

from minitron.errors import MinitronError
from minitron_platform.workers import part_call
from minitron_platform.workers.look import Look
from minitron_search.failures import cause

DEATHS = (WorkerCrashedError, NodeDiedError, OutOfMemoryError, LocalRayletDiedError, ObjectLostError)
AHEAD = 2  # parts under way or waiting for their turn, for each CPU of the cluster
LOOK_SECONDS = 2.0  # without any result, before another look at the cluster
END_SECONDS = 10  # longest wait for cancelled tasks to end

Common = TypeVar("Common")
Part = TypeVar("Part")
Result = TypeVar("Result")


@dataclass
class _Task:
    number: int
    part: Any
    failures: int = 0

    @property
    def attempt(self) -> str:
        """Differs for each time that a part is run."""
        return f"{self.number}.{self.failures}"


def run_parts(
    function: Callable[[Common, Part], Result],
    common: Common,
    parts: Iterable[Part],
    *,
    max_failures: int,
    say: Callable[[str], None],
    look: Look,
    cpus: float = 1,
) -> Iterator[Result]:
    """Call `function(common, part)` for each part in a task of Ray, and yield the results in the order of the parts.

    function, common: sent to each worker once. parts: read when another task can be started, and not further than the results
    that were yielded allow, so that a generator can end when the results suffice. max_failures: number of times that a worker
    may die with the same part. say: called with a sentence for every part that is run again. look: called while results are
    awaited, with what the tasks have requested if none of them has begun; what it raises ends the tasks. cpus: of each task.

    Ray must be initialized. If one part raises an error, or the iterator is closed, all tasks are cancelled. Raises the error
    of the part, and MinitronError if workers have died too often.
    """
    key = f"{uuid.uuid4().hex}-"
    content = [ray.put((function, common))]  # in a list, so that Ray does not resolve it for each task
    task_call = ray.remote(part_call.call).options(num_cpus=cpus, max_retries=0, scheduling_strategy="SPREAD")
    coming = enumerate(parts)
    running: dict[Any, _Task] = {}
    finished: dict[int, Result] = {}
    following = 0  # number of the part whose result is yielded next
    more = True
    try:
        while True:
            while following in finished:
                yield finished.pop(following)
                following += 1
            while more and len(running) + len(finished) < _most(cpus):
                number, part = next(coming, (-1, None))
                more = number >= 0
                if more:
                    task = _Task(number, part)
                    running[task_call.remote(content, part, key + task.attempt)] = task
            if not running:
                return
            for reference in _wait(running, key, cpus, look):
                task = running.pop(reference)
                try:
                    finished[task.number] = ray.get(reference)
                except DEATHS as error:
                    _count_death(task, error, max_failures, say)
                    running[task_call.remote(content, task.part, key + task.attempt)] = task
    except RayTaskError as error:
        raise cause(error) from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=END_SECONDS)
        with suppress(RayError):
            _internal_kv_del(key, del_by_prefix=True, namespace=part_call.NAMESPACE)


def busy() -> bool:
    """Whether most CPUs of the cluster are taken, so that few parts could run at the same time."""
    return bool(ray.available_resources().get("CPU", 0) < ray.cluster_resources().get("CPU", 0) / 2)


def _most(cpus: float) -> int:
    """Largest number of parts that are under way or wait for their turn."""
    return AHEAD * max(1, int(ray.cluster_resources().get("CPU", 0) / cpus))


def _wait(running: dict[Any, _Task], key: str, cpus: float, look: Look) -> list[Any]:
    """The tasks that have ended, at least one. key: what the keys of all begun attempts start with."""
    while not (ready := ray.wait(list(running), timeout=LOOK_SECONDS)[0]):
        begun = {
            name.decode().removeprefix(key) for name in _internal_kv_list(key, namespace=part_call.NAMESPACE) or ()
        }
        # no more of them than would run at the same time
        waiting = min(len(running), _most(cpus) // AHEAD)
        look([] if any(task.attempt in begun for task in running.values()) else [{"CPU": cpus}] * waiting)
    look()
    return list(ready)


def _count_death(task: _Task, error: BaseException, max_failures: int, say: Callable[[str], None]) -> None:
    """Say that a part is run again. Raises MinitronError if its workers have died too often."""
    task.failures += 1
    why = "its node ran out of memory" if isinstance(error, OutOfMemoryError) else "its worker or node died"
    if task.failures > max_failures:
        raise MinitronError(
            f"part {task.number} failed {task.failures} times: {why}",
            "look at the node's memory and disk; resources.max_failures allows more failures",
        ) from error
    say(f"  [yellow]part {task.number}: {why}, running it again ({task.failures} of {max_failures} failures)[/]")
