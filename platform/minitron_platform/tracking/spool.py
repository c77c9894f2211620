"""Records of a run, written to the storage before anything is sent to MLflow.

A spool is a folder of files as `parts` describes them; a line is an event as `events` describes it. On a local disk each event
is in the file when the call returns, and on the disk a second later. At a remote storage, events of up to REMOTE_SECONDS are
written together. An event is sent to MLflow only once it is durable here, so that MLflow never has what a later process does
not know.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from minitron import storage
from minitron.errors import StorageError, one_line
from minitron.storage import is_local
from minitron_platform.tracking.events import (
    Event,
    Status,
    check_key,
    line,
    numbers,
    read_lines,
    strings,
)
from minitron_platform.tracking.older_spool import import_older
from minitron_platform.tracking.parts import (
    PART_BYTES,
    SESSION,
    LocalPart,
    Portion,
    RemotePart,
    acquire_session,
    in_order,
    newest_session,
    open_part,
    part_sizes,
    read_part,
)
from minitron_platform.tracking.points import Points

log = logging.getLogger(__name__)

LOCAL_SECONDS = 1.0  # between two syncs of a local disk
REMOTE_SECONDS = 5.0  # between two writes to a remote storage
HURRIED_SECONDS = 1.0  # the same after hurry()
LAST_ATTEMPTS = 3  # writes that close() tries
OWN = 0  # owner of this process's points in the index; sessions start at 1


class Spool:
    """The records of the runs of one recipe, in the folder `folder`, which may be remote. One process at a time writes.

    experiment: name of the MLflow experiment that they belong to, by default that of earlier sessions. older: local folder in
    which earlier versions kept the records, which are moved into the spool.
    If another process begins to write, because it took the run over, this one writes and sends nothing more.
    The constructor raises StorageError if the spool cannot be read; writing never raises: if the storage refuses, one warning
    is logged, and the events are kept in memory and tried again.
    """

    def __init__(self, folder: str, *, experiment: str = "", older: str | None = None) -> None:
        self.folder = storage.absolute(folder)
        self.experiment = experiment
        self.session = 0  # this process's, once it has written
        self.fenced = False  # whether another process has begun to write
        self.lost = 0  # number of events that could not be stored until close()
        self.on_durable: Callable[[], None] = lambda: None  # called when new events can be sent
        self.on_event: Callable[[Event], None] = lambda event: None  # called with each new event
        self._points = Points()
        self._statuses: dict[str, str] = {}
        self._works: dict[str, str] = {}  # `of` of the latest start, by key
        self._touched: dict[str, str] = {}  # statuses that this process has recorded
        self._buffer = deque[bytes]()
        self._part: LocalPart | RemotePart | None = None
        self._durable: dict[str, int] = {}  # bytes of this session's parts that can be sent
        self._warned = False
        self._lock = threading.RLock()
        self._flushing = threading.Lock()
        self._due = threading.Event()
        self._hurried = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        import_older(older if older is not None else self.folder, self.folder)
        self._read: dict[str, int] = {}
        self._portions: list[Portion] = []
        self._read_others(part_sizes(self.folder))

    def record(self, key: str) -> RunLog:
        """The record of one run."""
        return RunLog(self, key)

    def status(self, key: str) -> str | None:
        """RUNNING, or the status with which the run ended; None for a run without a start or an end."""
        return self._statuses.get(key)

    def end_open(self, status: Status) -> None:
        """End every run that was started and not ended."""
        with self._lock:
            running = [key for key, current in self._statuses.items() if current == "RUNNING"]
        for key in running:
            self.record(key).end(status)

    def append(self, key: str, event: Event) -> None:
        """Record an event of the run `key`. Metric points that the run has already are left out."""
        with self._lock:
            if self.fenced:
                return
            event = {"t": time.time_ns() // 1_000_000, "key": key, **event}
            if event["event"] == "metrics" and not self._only_new_points(event):
                return
            self._index(event, OWN)
            self._buffer.append(line(event))
            if is_local(self.folder):
                self._attempt(self._write_buffer)
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(target=self._work, name="minitron-records", daemon=True)
                self._thread.start()
        self._due.set()
        self.on_event(event)

    def flush(self) -> None:
        """Make all events durable that were recorded before, if the storage allows it."""
        with self._flushing:
            if not self.fenced and (self._buffer or self._undurable()):
                self._attempt(self._write)
        self.on_durable()

    def hurry(self) -> None:
        """Make all events durable within a second, without waiting for it: for what nothing can measure again."""
        self._hurried.set()

    def close(self) -> None:
        """Make all events durable. Those that the storage refuses are counted in `lost`, with a warning."""
        self._closing.set()
        self._due.set()
        self._hurried.set()
        if self._thread is not None:
            self._thread.join()
        for attempt in range(LAST_ATTEMPTS):
            if self.fenced or not (self._buffer or self._undurable()):
                break
            if attempt:
                time.sleep(1.0)
            self.flush()
        with self._lock:
            if self._part is not None:
                self._part.close()
            self.lost = len(self._buffer)
        if self.lost and not self.fenced:
            log.warning("%s: %d records are lost", self.folder, self.lost)

    def unsent(self, positions: Mapping[str, int]) -> Iterator[tuple[Event | None, str, int]]:
        """Yield `(event, part, offset after it)` of the durable events after `positions`, in order; the event of a damaged line
        is None. Metric points that another session recorded first are left out.

        positions: the offset up to which each part was read before.
        """
        with self._lock:
            own = [Portion(name, 0, size) for name, size in self._durable.items()]
        for portion in (*self._portions, *own):
            start = max(portion.start, positions.get(portion.name, 0))
            if start >= portion.end:
                continue
            data = self._bytes(portion.name, start, portion.end)
            for event, offset in read_lines(data):
                yield self._first_recorded(event, portion.session), portion.name, start + offset

    def _first_recorded(self, event: Event | None, session: int) -> Event | None:
        """The event with only those metric points that `session` recorded first."""
        if event is None or event["event"] != "metrics":
            return event
        owner = OWN if session == self.session else session
        key, of, step = event["key"], event.get("of", ""), event["step"]
        with self._lock:
            values = {
                name: value
                for name, value in event["values"].items()
                if self._points.owner(key, name, of, step) == owner
            }
        return {**event, "values": values}

    def _only_new_points(self, event: Event) -> bool:
        """Remove the points from a new event that the run has already, and give it a fitting time; False if none is left."""
        key, step = event["key"], event["step"]
        of = event.setdefault("of", self._works.get(key, ""))
        if not of:
            del event["of"]
        event["values"] = {n: v for n, v in event["values"].items() if self._points.owner(key, n, of, step) is None}
        event["t"] = self._points.fitting_time(key, event["values"], of, step, event["t"])
        return bool(event["values"])

    def _index(self, event: Event, owner: int) -> None:
        """Add an event to what is known of its run."""
        key = event.get("key", "")
        if event["event"] == SESSION:
            self.experiment = self.experiment or str(event.get("experiment", ""))
        elif event["event"] == "start":
            self._statuses[key] = "RUNNING"
            self._works[key] = event.get("of") or self._works.get(event.get("parent") or "", "")
        elif event["event"] == "end":
            self._statuses[key] = event["status"]
        elif event["event"] == "metrics":
            of, step = event.get("of", ""), event["step"]
            for name in event["values"]:
                known = self._points.owner(key, name, of, step)
                if known is None:
                    self._points.add(key, name, of, step, event["t"], owner)
                elif known == OWN:  # written before this process began to write, but read only now
                    self._points.give(key, name, of, step, owner)
        if owner == OWN and key in self._statuses:
            self._touched[key] = self._statuses[key]

    def _read_others(self, sizes: Mapping[str, int]) -> None:
        """Index what other sessions have written, as far as it is new; `sizes` are those of their parts."""
        changed = [name for name, size in sizes.items() if size > self._read.get(name, 0)]
        if not changed:
            return
        parts = {name: read_part(self.folder, name) for name in sizes}
        self._portions = list(in_order(parts))
        for portion in self._portions:
            start = max(portion.start, self._read.get(portion.name, 0))
            for event, _ in read_lines(parts[portion.name][start : portion.end]):
                if event is not None:
                    self._index(event, portion.session)
        self._read = {name: len(data) for name, data in parts.items()}
        self._statuses.update(self._touched)

    def _acquire(self) -> None:
        """Begin a session of this process, and read what others wrote before it."""
        session = acquire_session(self.folder, max((p.session for p in self._portions), default=0))
        others = {name: size for name, size in part_sizes(self.folder).items() if int(name[:6]) < session}
        with self._lock:
            self._read_others(others)
            note = {"t": time.time_ns() // 1_000_000, "event": SESSION, "read": self._read}
            self._buffer.appendleft(line({**note, "experiment": self.experiment}))
            self._part = open_part(self.folder, session, 1)
            self.session = session

    def _write(self) -> None:
        """Make the buffer durable."""
        if self._part is None:
            if is_local(self.folder):
                with self._lock:
                    self._acquire()
            else:
                self._acquire()
        with self._lock:
            self._write_buffer()
            part = self._part
        assert part is not None
        size = part.sync()
        if newest_session(self.folder) > self.session:
            self.fenced = True  # it may not have read what was just written, so this is left to it
            log.warning("%s: another process records this run now; this one writes nothing more", self.folder)
            return
        with self._lock:
            self._durable[part.name] = size
            if part.size == size >= PART_BYTES:
                part.close()
                self._part = open_part(self.folder, self.session, int(part.name.split(".")[1]) + 1)

    def _write_buffer(self) -> None:
        """Move the buffer into the present part."""
        if self._part is None:
            self._acquire()
        assert self._part is not None
        while self._buffer:
            self._part.add(self._buffer[0])
            self._buffer.popleft()

    def _undurable(self) -> bool:
        """Whether the present part has lines that are not durable."""
        return self._part is not None and self._part.size > self._durable.get(self._part.name, 0)

    def _attempt(self, write: Callable[[], None]) -> None:
        """Call `write`; if the storage refuses, log one warning."""
        try:
            write()
        except (OSError, StorageError) as error:
            if not self._warned:
                log.warning("%s: records cannot be written, and are kept in memory: %s", self.folder, one_line(error))
            self._warned = True
        else:
            self._warned = False

    def _work(self) -> None:
        interval = LOCAL_SECONDS if is_local(self.folder) else REMOTE_SECONDS
        while not self._closing.is_set():
            self._due.wait()
            self._due.clear()
            self._hurried.clear()
            self.flush()
            if self._buffer:
                self._due.set()  # the storage has refused it
            self._closing.wait(HURRIED_SECONDS)
            self._hurried.wait(interval - HURRIED_SECONDS)

    def _bytes(self, name: str, start: int, end: int) -> bytes:
        """Bytes of a part."""
        with self._lock:
            part = self._part
        if isinstance(part, RemotePart) and part.name == name:
            return bytes(part.content[start:end])
        return storage.read_bytes(storage.join(self.folder, name))[start:end]


class RunLog:
    """Writes the record of one run of a spool. The methods never raise; see `Spool`.

    key: identifies the run in the spool and, as the tag `minitron.key`, in the MLflow experiment.
    Raises InputError for a key with other characters than letters, digits, dot, underscore and dash.
    """

    def __init__(self, spool: Spool, key: str) -> None:
        self.spool = spool
        self.key = check_key(key)

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended with the status FINISHED, and has not started again."""
        return self.spool.status(self.key) == "FINISHED"

    def start(self, name: str, parent: str | None = None, tags: Mapping[str, Any] | None = None, of: str = "") -> None:
        """Record that the run starts, or continues after it had ended.

        parent: key of its parent run in MLflow. of: fingerprint of the run's work, by default the parent's; points of the same
        work are recorded once.
        """
        if parent is not None:
            check_key(parent)
        work = {"of": of} if of else {}
        self._append({"event": "start", "name": name, "parent": parent, "tags": strings(tags or {}), **work})

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters of the run, as text. MLflow keeps the first value; a later one becomes the tag `changed.<name>`."""
        self._append({"event": "params", "values": strings(values)})

    def metrics(self, values: Mapping[str, Any], step: int, of: str = "") -> None:
        """Record numbers at a step, converted by float(). Those that are recorded for the step already are ignored.

        of: fingerprint of the work that they belong to, by default that of `start`.
        """
        work = {"of": of} if of else {}
        self._append({"event": "metrics", "step": int(step), "values": numbers(values), **work})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Record tags of the run, as text; MLflow keeps the last value."""
        self._append({"event": "tags", "values": strings(values)})

    def artifact(self, path: str, folder: str = "") -> None:
        """Record a file as an artifact below `folder`; local folders too. It must not be deleted before it is uploaded.

        A path in the spool's parent folder is recorded relative to it, so that any machine can upload it.
        """
        path = storage.absolute(path)
        run_folder = self.spool.folder.rsplit("/", 1)[0]
        self._append({"event": "artifact", "path": path.removeprefix(f"{run_folder}/"), "folder": folder})

    def dataset(self, name: str, *, digest: str, source: str, context: str, tokens: int) -> None:
        """Record a dataset that the run reads. digest: of its content. context: what it is for, such as "training"."""
        values = {"name": name, "digest": digest, "source": source, "context": context, "tokens": int(tokens)}
        self._append({"event": "dataset", **values})

    def end(self, status: Status = "FINISHED") -> None:
        """Record that the run ended."""
        self._append({"event": "end", "status": status})

    def _append(self, event: Event) -> None:
        self.spool.append(self.key, event)
