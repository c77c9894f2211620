"""Fencing: who holds a lease may write, and nobody who held it before.

A lease is a folder in the storage. Each acquisition creates the next numbered file there, its epoch; the highest number is the
holder's. So all that is asked of the storage is to create a file only if it is not there.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import time
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

from minitron import storage
from minitron.errors import MinitronError, StorageError

EPOCH = re.compile(r"^(\d{8})\.json$")


class LeaseLostError(MinitronError):
    """Another driver took the work over; whoever sees this must write nothing more."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease. `process` tells it from a later one with the same number on the same machine."""

    user: str
    host: str
    pid: int
    process: str
    run: str
    since: float  # seconds since 1970, for people to read; nothing is decided by clocks of several machines
    ttl: float  # seconds without a heartbeat after which it may be taken for dead

    @classmethod
    def this_process(cls, run: str, ttl: float) -> Holder:
        pid = os.getpid()
        return cls(_user(), socket.gethostname(), pid, _process(pid), run, time.time(), ttl)

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"{self.user}@{self.host}, process {self.pid}, since {since}"

    def is_gone(self) -> bool:
        """Whether it ran where this process can see, and no longer does. False where that can't be known."""
        if self.host != socket.gethostname() or not self.process:
            return False
        here = _process(os.getpid())
        same_machine = here.split()[:2] == self.process.split()[:2]
        return same_machine and _process(self.pid) != self.process


@dataclass(frozen=True)
class Fence:
    """One acquisition of the lease in `folder`. May be pickled to workers, which check it before they commit anything."""

    folder: str
    epoch: int
    what: str

    def check(self) -> None:
        """Raise LeaseLostError if somebody took the lease over, StorageError if the storage does not answer."""
        newest = newest_epoch(self.folder)
        if newest == self.epoch:
            return
        holder = read_holder(self.folder, newest) if newest else None
        raise LeaseLostError(
            f"{self.what} was taken over by {holder or 'somebody else'}; nothing more is written from here",
            "follow it there; what this process had finished is used by it",
        )

    @cached_property
    def beat_path(self) -> str:
        return storage.join(self.folder, f"{self.epoch:08d}.beat")

    @cached_property
    def end_path(self) -> str:
        return storage.join(self.folder, f"{self.epoch:08d}.end")


def epoch_path(folder: str, epoch: int) -> str:
    return storage.join(folder, f"{epoch:08d}.json")


def newest_epoch(folder: str) -> int:
    """The highest epoch of a lease, 0 where nobody ever held it."""
    return max((int(found.group(1)) for name in storage.names(folder) if (found := EPOCH.match(name))), default=0)


def read_holder(folder: str, epoch: int) -> Holder | None:
    """Who acquired an epoch; None where the next one has cleared it away meanwhile."""
    path = epoch_path(folder, epoch)
    try:
        value = storage.read_json(path)
    except StorageError:
        if storage.exists(path):
            raise
        return None
    match value:
        case {"user": str(), "host": str(), "pid": int(), "process": str(), "run": str()}:
            if all(isinstance(value.get(name), int | float) for name in ("since", "ttl")):
                return Holder(**{field.name: value[field.name] for field in fields(Holder)})
    raise StorageError(f"{path}: not a lease", f"delete {folder} if no run is going on")


def create_epoch(folder: str, epoch: int, holder: Holder) -> bool:
    """Acquire an epoch; False where another process was faster."""
    return storage.create_bytes(epoch_path(folder, epoch), (json.dumps(asdict(holder)) + "\n").encode())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _process(pid: int) -> str:
    """Boot, process namespace and start time: together with the number they name a process for ever. "" where it is gone,
    or where there is no /proc to know it from."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {started}"
    except (OSError, IndexError):
        return ""
