"""What a function that a stage runs on workers knows about its process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

COUNT_SECONDS = 0.5  # shortest time between two counts that a worker sends to the driver


class Progress(Protocol):
    """Messages for the user; `minitron_platform.console.Console` is one."""

    def say(self, message: str) -> None:
        """Print a line with rich markup."""

    def status(self, message: str) -> None:
        """Set the status of the current work."""

    def counter(self, unit: str) -> Callable[[int, int], None]:
        """A progress callback `(done, total)`."""


def _nothing() -> None:
    pass


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Worker:
    """A process that runs a function, alone or together with others in one process group of torch.distributed."""

    rank: int
    count: int
    """Number of processes that run the function together."""
    progress: Progress
    send: Callable[[object], None]
    """Sends an event to the driver, if this is the first process; those of other processes are dropped."""
    resumable: Callable[[], None] = _nothing
    """Says that a restart would lose nothing now, so that the group may be restarted with more processes."""
    before_commit: Callable[[], None] = _nothing
    """To be called before anything is written that other processes read: raises TakenOverError if another driver has taken the
    work over."""
    is_leaving: Callable[[], bool] = _never
    """Whether the node of one of the processes is about to be taken away."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that sends events and writes results that all have."""
        return self.rank == 0


@dataclass(frozen=True)
class WorkerStarted:
    """A worker has started."""

    rank: int
    node: str
    """Host name and address of its node."""


@dataclass(frozen=True)
class WorkersFailed:
    """Workers died or raised an error."""

    ranks: tuple[int, ...]
    """Workers that failed first, without those that failed only because they lost the connection to these. None if a node is
    to be taken away."""
    reason: str
    counts: bool = True
    """Whether it is one of the failures that are allowed; a node that is taken away is none."""
    restarted: bool = True
    """Whether the workers are restarted: failures are left, and the error would not come again."""

    @property
    def who(self) -> str:
        """For example "workers 0, 1"."""
        return f"worker{'' if len(self.ranks) == 1 else 's'} {', '.join(map(str, self.ranks))}".rstrip()


@dataclass(frozen=True)
class Said:
    """A line for the user, with rich markup."""

    text: str


@dataclass(frozen=True)
class StatusChanged:
    """A new status of the work."""

    text: str


@dataclass(frozen=True)
class Counted:
    """Progress: `done` of `total` items of `unit`."""

    done: int
    total: int
    unit: str


class SentProgress:
    """A `Progress` of the first of `count` processes, which sends its messages to the driver as events."""

    def __init__(self, send: Callable[[object], None], count: int) -> None:
        self._send = send
        self._share = f" in the first of {count} workers" if count > 1 else ""

    def say(self, message: str) -> None:
        self._send(Said(message))

    def status(self, message: str) -> None:
        self._send(StatusChanged(message))

    def counter(self, unit: str) -> Callable[[int, int], None]:
        latest = 0.0

        def update(done: int, total: int) -> None:
            nonlocal latest
            if done in (0, total) or time.monotonic() - latest > COUNT_SECONDS:
                latest = time.monotonic()
                self._send(Counted(done, total, unit + self._share))

        return update
