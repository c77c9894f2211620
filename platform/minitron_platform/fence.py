"""Fencing: only the current holder of a lease may write, never an earlier one.

A lease is a folder in the storage. Each acquisition creates the next numbered file in it; the number is called its epoch, and
the highest epoch belongs to the current holder. The storage only has to support creating a file if it does not exist yet.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

from minitron import storage
from minitron.errors import StorageError, TakenOverError

EPOCH = re.compile(r"^(\d{8})\.json$")


class LeaseLostError(TakenOverError):
    """Another driver has taken the lease over."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease."""

    user: str
    host: str
    pid: int
    process: str
    """Identifies the process among later ones with the same pid; empty if the system does not allow that."""
    run: str
    """Key of the run that it carries out."""
    since: float
    """Unix time of the acquisition. Only shown, never compared: clocks of different machines may differ."""
    ttl: float
    """Seconds without a heartbeat after which other drivers may assume that the process is dead."""

    @classmethod
    def this_process(cls, run: str, ttl: float) -> Holder:
        """This process, carrying out `run`."""
        pid = os.getpid()
        return cls(_user(), socket.gethostname(), pid, _process_identity(pid), run, time.time(), ttl)

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"{self.user}@{self.host}, process {self.pid}, since {since}"

    def is_gone(self) -> bool:
        """Whether the process has ended. False if this process cannot tell, for example because it runs on another machine."""
        if self.host != socket.gethostname() or not self.process:
            return False
        this_process = _process_identity(os.getpid())
        same_machine = this_process.split()[:2] == self.process.split()[:2]  # same boot and process namespace
        return same_machine and _process_identity(self.pid) != self.process


@dataclass(frozen=True)
class Fence:
    """One acquisition of a lease. It can be pickled and sent to workers, which check it before they commit anything."""

    folder: str
    """Folder of the lease in the storage."""
    epoch: int
    what: str
    """Name of the work that the lease protects, for messages."""

    def check(self) -> None:
        """Raise LeaseLostError if another driver has taken the lease over, StorageError if the storage does not answer."""
        newest = newest_epoch(storage.names(self.folder))
        if newest == self.epoch:
            return
        holder = read_holder(self.folder, newest) if newest else None
        raise LeaseLostError(
            f"{self.what} was taken over by {holder or 'another driver'}; this process writes nothing more",
            "follow the other driver; it reuses everything that this process had finished",
        )

    @cached_property
    def beat_path(self) -> str:
        """File that holds the holder's latest heartbeat."""
        return storage.join(self.folder, f"{self.epoch:08d}.beat")

    @cached_property
    def end_path(self) -> str:
        """File that exists once the holder has released the lease."""
        return storage.join(self.folder, end_name(self.epoch))


@dataclass(frozen=True)
class Fences:
    """All leases that a driver holds for a work."""

    fences: tuple[Fence, ...] = ()

    def check(self) -> None:
        """Raise LeaseLostError if another driver has taken any of them over."""
        for fence in self.fences:
            fence.check()


def epoch_path(folder: str, epoch: int) -> str:
    """File of an acquisition of the lease in `folder`; it holds the Holder as JSON."""
    return storage.join(folder, f"{epoch:08d}.json")


def end_name(epoch: int) -> str:
    """Name of the file that exists once the holder of an epoch has released the lease."""
    return f"{epoch:08d}.end"


def newest_epoch(names: Iterable[str]) -> int:
    """The highest epoch of a lease, from the names of its files; 0 if nobody has ever held it."""
    return max((int(match.group(1)) for name in names if (match := EPOCH.match(name))), default=0)


def read_holder(folder: str, epoch: int) -> Holder | None:
    """The process that acquired an epoch; None if a later holder has removed the file meanwhile.

    Raises StorageError for a file that is not a lease, or cannot be read.
    """
    path = epoch_path(folder, epoch)
    value = storage.read_json_if_exists(path)
    if value is None:
        return None
    match value:
        case {"user": str(), "host": str(), "pid": int(), "process": str(), "run": str()}:
            if all(isinstance(value.get(name), int | float) for name in ("since", "ttl")):
                return Holder(**{field.name: value[field.name] for field in fields(Holder)})
    raise StorageError(f"{path}: not a lease", f"delete {folder} if no run is active")


def create_epoch(folder: str, epoch: int, holder: Holder) -> bool:
    """Acquire an epoch; returns False if another process was faster."""
    return storage.create_bytes(epoch_path(folder, epoch), (json.dumps(asdict(holder)) + "\n").encode())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user of a container may have no name
        return str(os.getuid())


def _process_identity(pid: int) -> str:
    """Boot id, process namespace and start time, which together with the pid identify a process uniquely.

    Empty if the process has ended, or on systems without /proc.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {started}"
    except (OSError, IndexError):
        return ""
