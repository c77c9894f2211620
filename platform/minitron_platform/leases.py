"""Mutual exclusion of drivers: leases in the storage that they share, kept alive by heartbeats.

The holder of a lease writes a heartbeat every quarter of `MINITRON_LEASE_SECONDS` (60 by default). Another driver takes the
lease over if it has seen no new heartbeat for that time by its own clock, if the holder's process has ended on the same
machine, or if its user asks for it (`--take-over`). A holder that is still alive sees the newer epoch at its next heartbeat or
commit, and stops.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

from rich.markup import escape

from minitron import storage
from minitron.errors import InputError, MinitronError, StorageError, one_line
from minitron_platform.console import Console
from minitron_platform.fence import Fence, Holder, LeaseLostError, create_epoch, end_name, newest_epoch, read_holder
from minitron_platform.locations import Locations

log = logging.getLogger(__name__)

SECONDS = "MINITRON_LEASE_SECONDS"
DEFAULT_SECONDS = 60.0


class LeaseHeldError(MinitronError):
    """Another driver holds the lease and is alive."""


def lease_seconds() -> float:
    """Seconds without a heartbeat after which a driver is assumed to be dead, from MINITRON_LEASE_SECONDS.

    Raises InputError if the variable is not a number from 1 to 86400.
    """
    text = os.environ.get(SECONDS, "").strip()
    try:
        seconds = float(text or DEFAULT_SECONDS)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 86_400:
        raise InputError(f"{SECONDS}={text!r}", "give a number of seconds from 1 to 86400, or unset it")
    return seconds


@contextmanager
def lease(
    locations: Locations,
    name: str,
    what: str,
    *,
    run: str,
    console: Console,
    take_over: str = "",
    wait: bool = True,
) -> Iterator[Fence]:
    """Hold the lease `name` of the storage inside the block; first waits until no other driver holds it.

    what: name of the work, for messages. run: key of the run that needs the lease. take_over: if not empty, take the lease
    from another driver of the same run without waiting; the text is the reason for messages. wait: if false, raise
    LeaseHeldError as soon as the holder is seen to be alive.

    The lease is released at the end of the block. If it is lost inside the block, the main thread gets SIGINT, which interrupts
    blocking calls, and the block raises LeaseLostError in place of any other exception.
    Raises StorageError for a storage without conditional writes, InputError for an invalid MINITRON_LEASE_SECONDS.
    """
    folder = storage.join(locations.storage, "leases", name)
    _check_conditional_writes(locations.storage)
    holder = Holder.this_process(run, lease_seconds())
    fence = Fence(folder, _acquire(folder, what, holder, console, take_over, wait), what)
    heartbeat = _Heartbeat(fence, holder.ttl)
    heartbeat.start()
    ended_with: BaseException | None = None
    try:
        yield fence
    except BaseException as error:
        ended_with = error
        raise
    finally:
        heartbeat.stop()
        if heartbeat.lost is None:
            _release(fence)
        elif ended_with is not heartbeat.lost:
            raise heartbeat.lost from ended_with


def _release(fence: Fence) -> None:
    try:
        storage.write_bytes(fence.end_path, b"")
    except StorageError as error:  # the error that ended the work matters more, and others see that this process ended
        log.warning("%s: the lease was not released (%s)", fence.what, error.problem)


def _acquire(folder: str, what: str, holder: Holder, console: Console, take_over: str, wait: bool) -> int:
    """Wait until the lease is free, has expired or may be taken over, and acquire it. Returns the new epoch."""
    announced = 0  # the epoch that the user was told about
    last_beat = ""
    last_beat_at = time.monotonic()
    current: Holder | None = None
    known = 0  # the epoch of `current`
    next_look = 0.0  # when to read the heartbeat, which changes every quarter of its time to live
    while True:
        files = storage.names(folder)
        epoch = newest_epoch(files)
        if epoch != known or current is None:
            current = read_holder(folder, epoch) if epoch else None
            known, next_look = epoch, 0.0
        released = end_name(epoch) in files
        reason = ""
        if current is not None and not released:
            now = time.monotonic()
            beat = last_beat
            if now >= next_look or now - last_beat_at > current.ttl:
                beat = f"{epoch} {_beat(Fence(folder, epoch, what))}"
                next_look = now + current.ttl / 8
            if beat != last_beat:
                if last_beat and not wait:
                    raise LeaseHeldError(f"{what} is held by {current}", "wait until it ends")
                last_beat = beat
                last_beat_at = time.monotonic()
            if current.is_gone():
                reason = "its process has ended"
            elif take_over and current.run == holder.run:
                reason = take_over
            elif time.monotonic() - last_beat_at > current.ttl:
                reason = f"no heartbeat for {current.ttl:g} s"
        if current is None or released or reason:
            if create_epoch(folder, epoch + 1, holder):
                files = storage.names(folder)
                # otherwise later holders have removed the file that was in the way
                if newest_epoch(files) == epoch + 1:
                    if reason:
                        console.say(f"  [yellow]{escape(what)} taken over from {escape(str(current))}: {reason}[/]")
                    _remove_earlier_epochs(folder, files, epoch + 1)
                    return epoch + 1
            continue  # another driver was faster
        if announced != epoch and wait:
            hint = "; use --take-over to take it from that driver" if current.run == holder.run else ""
            console.say(f"  [yellow]{escape(what)} is held by {escape(str(current))}. Waiting for it to end{hint}[/]")
            announced = epoch
        console.status(f"waiting for {escape(current.user)}@{escape(current.host)}, process {current.pid}")
        time.sleep(min(0.5 if storage.is_local(folder) else 2.0, current.ttl / 4))


def _beat(fence: Fence) -> str:
    return (storage.read_bytes_if_exists(fence.beat_path) or b"").decode(errors="replace")  # there may be none yet


def _remove_earlier_epochs(folder: str, files: Iterable[str], epoch: int) -> None:
    """Remove those of the lease's files that are of epochs before `epoch`."""
    for name in files:
        if name[:8].isdigit() and int(name[:8]) < epoch:
            storage.remove(storage.join(folder, name))


@lru_cache
def _check_conditional_writes(root: str) -> None:
    """Raise StorageError for a storage that ignores conditions on writes, so that two drivers could hold the same lease."""
    probe = storage.join(root, "leases", f".probe-{os.urandom(8).hex()}")
    first = storage.create_bytes(probe, b"1")
    second = storage.create_bytes(probe, b"2")
    storage.remove(probe)
    if not first or second:
        raise StorageError(
            f"{root}: this storage overwrites an existing file although the write is conditional (If-None-Match)",
            "use storage with conditional writes: S3, GCS, Azure, MinIO of 2024-09 or newer, or a shared folder",
        )


class _Heartbeat(threading.Thread):
    """Writes the heartbeats of one lease, and notices if the lease is lost."""

    def __init__(self, fence: Fence, ttl: float) -> None:
        super().__init__(name="minitron-lease", daemon=True)
        self.fence = fence
        self.interval = ttl / 4
        self.lost: LeaseLostError | None = None
        self._in_main = threading.current_thread() is threading.main_thread()
        self._stop_now = threading.Event()

    def run(self) -> None:
        beats = 0
        failing = False
        while True:
            beats += 1
            try:
                storage.write_bytes(self.fence.beat_path, str(beats).encode())
                if beats > 1:  # whoever has acquired the lease has looked a moment ago
                    self.fence.check()
                failing = False
            except LeaseLostError as error:
                self.lost = error
                if self._in_main:
                    os.kill(os.getpid(), signal.SIGINT)
                with suppress(StorageError):  # the new holder removes it later
                    storage.remove(self.fence.beat_path)
                return
            except (OSError, StorageError) as error:
                if not failing:
                    log.warning("%s: no heartbeat could be written (%s)", self.fence.folder, one_line(error))
                failing = True
            if self._stop_now.wait(self.interval):
                return

    def stop(self) -> None:
        while True:
            try:
                self._stop_now.set()
                self.join()
                return
            except KeyboardInterrupt:
                if self.lost is None:
                    raise  # the user's; otherwise the last heartbeat has just seen that the lease is lost
