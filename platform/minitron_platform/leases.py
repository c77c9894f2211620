"""One driver at a time: leases in the storage that all drivers share, kept alive by heartbeats.

The holder writes a heartbeat every quarter of `MINITRON_LEASE_SECONDS` (60 by default). Another driver takes over when it has
seen no new heartbeat for that long by its own clock, when the holder's process is gone from the same machine, or when its user
says so. A holder that was taken over for dead finds a newer epoch at its next heartbeat or commit, and stops.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

from rich.markup import escape

from minitron import storage
from minitron.errors import InputError, StorageError
from minitron_platform.console import Console
from minitron_platform.fence import Fence, Holder, LeaseLostError, create_epoch, newest_epoch, read_holder
from minitron_platform.locations import Locations

log = logging.getLogger(__name__)

SECONDS = "MINITRON_LEASE_SECONDS"
DEFAULT_SECONDS = 60.0


def lease_seconds() -> float:
    """Seconds without a heartbeat after which a driver may be taken for dead. Raises InputError for what is not a number."""
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
    where: Locations, name: str, what: str, *, run: str, console: Console, take_over: str = ""
) -> Iterator[Fence]:
    """Hold the lease `name` of the storage inside the block, after waiting for whoever holds it.

    what: the work, as messages name it. run: the key of the run that wants it. take_over: don't wait for another driver of
    the same run, for this reason. Leaving the block gives the lease back. When the lease is lost inside it, SIGINT is
    raised, so that work which blocks ends, and LeaseLostError leaves the block whatever else does.
    """
    folder = storage.join(where.storage, "leases", name)
    _check_exclusive(where.storage)
    holder = Holder.this_process(run, lease_seconds())
    fence = Fence(folder, _acquire(folder, what, holder, console, take_over), what)
    heart = _Heart(fence, holder.ttl)
    heart.start()
    try:
        yield fence
    except BaseException as error:
        if heart.lost is not None and error is not heart.lost:
            raise heart.lost from error
        raise
    finally:
        heart.stop()
        if heart.lost is None:
            _give_back(fence)
    if heart.lost is not None:
        raise heart.lost


def _give_back(fence: Fence) -> None:
    try:
        storage.write_bytes(fence.end_path, b"")
    except StorageError as error:  # what ended the work matters more, and others see that this process is gone
        log.warning("%s: not given back (%s)", fence.what, error.problem)


def _acquire(folder: str, what: str, holder: Holder, console: Console, take_over: str) -> int:
    """Wait until the lease is free, expired or to be taken over; the epoch that was acquired."""
    said, seen, seen_at = 0, "", time.monotonic()
    while True:
        epoch = newest_epoch(folder)
        current = read_holder(folder, epoch) if epoch else None
        ended = storage.exists(Fence(folder, epoch, what).end_path)
        reason = ""
        if current is not None and not ended:
            beat = f"{epoch} {_beat(Fence(folder, epoch, what))}"
            if beat != seen:
                seen, seen_at = beat, time.monotonic()
            if current.is_gone():
                reason = "its process is gone"
            elif take_over and current.run == holder.run:
                reason = take_over
            elif time.monotonic() - seen_at > current.ttl:
                reason = f"no sign of life for {current.ttl:g} s"
        if current is None or ended or reason:
            if create_epoch(folder, epoch + 1, holder):
                if reason:
                    console.say(f"  [yellow]{escape(what)} taken over from {escape(str(current))}: {reason}[/]")
                _clear(folder, epoch + 1)
                return epoch + 1
            continue  # somebody else was faster
        if said != epoch:
            same = "; --take-over takes it from there" if current.run == holder.run else ""
            console.say(f"  [yellow]{escape(what)} is going on: {escape(str(current))}. Waiting for it to end{same}[/]")
            said = epoch
        console.status(f"waiting for {escape(current.user)}@{escape(current.host)}, process {current.pid}")
        time.sleep(min(0.5 if storage.is_local(folder) else 2.0, current.ttl / 4))


def _beat(fence: Fence) -> str:
    try:
        return storage.read_bytes(fence.beat_path).decode(errors="replace")
    except StorageError:
        return ""  # none yet


def _clear(folder: str, epoch: int) -> None:
    """Remove what earlier epochs left."""
    for name in storage.names(folder):
        if name[:8].isdigit() and int(name[:8]) < epoch:
            storage.remove(storage.join(folder, name))


@lru_cache
def _check_exclusive(root: str) -> None:
    """Refuse storage where two drivers could hold one lease, because it ignores conditions on what it is told to write."""
    probe = storage.join(root, "leases", f".probe-{os.urandom(8).hex()}")
    first = storage.create_bytes(probe, b"1")
    second = storage.create_bytes(probe, b"2")
    storage.remove(probe)
    if not first or second:
        raise StorageError(
            f"{root}: this storage overwrites a file that it was told to create only if it is not there (If-None-Match)",
            "use storage with conditional writes: S3, GCS, Azure, MinIO of 2024-09 or newer, or a shared folder",
        )


class _Heart(threading.Thread):
    """Writes the heartbeats of one lease, and finds out when it was lost."""

    def __init__(self, fence: Fence, ttl: float) -> None:
        super().__init__(name="minitron-lease", daemon=True)
        self.fence, self.interval = fence, ttl / 4
        self.lost: LeaseLostError | None = None
        self._in_main = threading.current_thread() is threading.main_thread()
        self._stop_now = threading.Event()

    def run(self) -> None:
        beats, failing = 0, False
        while True:
            beats += 1
            try:
                storage.write_bytes(self.fence.beat_path, str(beats).encode())
                self.fence.check()
                failing = False
            except LeaseLostError as error:
                self.lost = error
                if self._in_main:
                    os.kill(os.getpid(), signal.SIGINT)
                with suppress(StorageError):  # whoever holds it now clears it away in the end
                    storage.remove(self.fence.beat_path)
                return
            except (OSError, StorageError) as error:
                if not failing:
                    log.warning("%s: no heartbeat could be written (%s)", self.fence.folder, error)
                failing = True
            if self._stop_now.wait(self.interval):
                return

    def stop(self) -> None:
        self._stop_now.set()
        self.join()
