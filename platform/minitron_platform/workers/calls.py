"""Calls of functions on a group of workers: one actor holds the present call, which all workers ask for and answer.

When a worker fails, Ray Train restarts the group, whose processes ask again and get the same call.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minitron_platform.workers.worker import WorkersFailed, WorkerStarted
from minitron_search.committed_checkpoints import CommittedCheckpoints


@dataclass(frozen=True)
class Call:
    """A function to run in the processes of the group."""

    number: int
    """Calls are counted from 1."""
    content: list[Any]
    """One reference to the function, its argument and `Worker.before_commit`, in a list so that Ray does not resolve it on the
    way."""
    everywhere: bool
    """Whether all processes run it, or only the first one."""


@dataclass(frozen=True)
class Returned:
    """All processes have returned from a call."""

    result: Any
    """What the first process returned."""


@dataclass(frozen=True)
class GroupEnded:
    """The group of workers has ended."""


class _Calls:
    """The actor. max_failures: how often the workers may fail during one call."""

    def __init__(self, max_failures: int) -> None:
        self.max_failures = max_failures
        self.failures = 0  # of the present call
        self.call: Call | None = None
        self.stopped = False
        self.changed = asyncio.Condition()
        self.events: asyncio.Queue[object] = asyncio.Queue()
        self.size = 0
        self.workers: dict[int, tuple[WorkerStarted, bytes]] = {}
        self.controller: list[bytes] = []  # its actor, once it has started
        self.returned: set[int] = set()  # ranks that have returned from the present call
        self.result: Any = None
        self.busy = False  # whether a call is in progress
        self.checkpoints = CommittedCheckpoints()

    # for the driver

    async def start(self, content: list[Any], everywhere: bool) -> None:
        """Begin a call; the one before it has returned."""
        self.failures = 0
        self.busy, self.checkpoints = True, CommittedCheckpoints()
        self.returned.clear()
        number = self.call.number + 1 if self.call else 1
        for started, _ in self.workers.values():
            self.events.put_nowait(started)
        async with self.changed:
            self.call = Call(number, content, everywhere)
            self.changed.notify_all()

    async def stop(self) -> None:
        """End the workers as soon as they have returned from the present call."""
        async with self.changed:
            self.stopped = True
            self.changed.notify_all()

    async def handles(self) -> list[bytes]:
        """Actors of the workers, from `packed_actor`."""
        return [handle for _, handle in self.workers.values()]

    async def controllers(self) -> list[bytes]:
        """The actor of Ray Train's controller, if it has started, from `packed_actor`."""
        return self.controller

    async def get(self) -> object:
        """The next event."""
        return await self.events.get()

    async def put(self, event: object) -> None:
        """Add an event."""
        self.events.put_nowait(event)

    # for the workers

    async def begin(self, size: int) -> None:
        """A new group of `size` workers begins; called by the first of them before the others go on."""
        self.size = size
        self.workers.clear()
        self.returned.clear()

    async def join(self, event: WorkerStarted, handle: bytes) -> None:
        """A worker of the group is ready."""
        self.workers[event.rank] = (event, handle)
        if self.call:
            self.events.put_nowait(event)

    async def next(self, done: int) -> Call | None:
        """Wait for the call after number `done`; None if there will not be any."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.stopped or (self.call is not None and self.call.number > done))
        return None if self.stopped else self.call

    async def answer(self, number: int, rank: int, result: list[Any]) -> None:
        """A worker has returned from call `number`."""
        if self.call is None or number != self.call.number:
            return
        self.returned.add(rank)
        if rank == 0:
            self.result = result
        if len(self.returned) == self.size:
            self.events.put_nowait(Returned(self.result))
            self.busy, self.result = False, None

    async def resumable(self) -> None:
        """A restart would lose nothing now."""
        self.checkpoints.resumable()

    # for Ray Train's controller

    async def controller_started(self, handle: bytes) -> None:
        """The controller has started."""
        self.controller = [handle]

    async def may_resize(self, first: bool) -> bool:
        """Whether the group may be restarted with another number of workers now: between calls, or just after a checkpoint.
        first: whether the controller wants that only now, so that an earlier checkpoint does not count."""
        return self.checkpoints.may_resize(first) or not self.busy

    async def may_restart(self, event: WorkersFailed, retryable: bool) -> bool:
        """Whether the workers are restarted after a failure."""
        self.failures += event.counts
        self.workers.clear()
        if self.stopped:
            return False
        restarted = retryable and self.failures <= self.max_failures
        if self.call:
            self.events.put_nowait(replace(event, restarted=restarted))
        return restarted


def start_calls(max_failures: int) -> Any:
    """The handle of a new actor on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0)(_Calls)
    return actor.options(scheduling_strategy=here).remote(max_failures)


def packed_actor() -> bytes:
    """This process's actor, pickled: the actor of calls only passes it on, and would import Ray Train to read it."""
    return bytes(cloudpickle.dumps(ray.get_runtime_context().current_actor))


def node_name() -> str:
    """Host name and address of this worker's node."""
    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"


def sender(calls: Any, rank: int) -> Callable[[object], None]:
    """A function that sends events of the first process to the driver; at most one of them is lost if the process dies."""
    unconfirmed: list[Any] = []

    def send(event: object) -> None:
        if rank == 0:
            with suppress(RayError):  # lost events do not stop the work
                ray.get(unconfirmed)
            unconfirmed[:] = [calls.put.remote(event)]

    return send
