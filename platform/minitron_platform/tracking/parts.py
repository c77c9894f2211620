"""The files of a spool, which is a folder in the storage.

Every process that writes to a spool has a session of its own, with the next number, and writes numbered files
`<session>.<part>.jsonl`. Lines are only added to the last part. On a local disk they are appended; an object store cannot
append, so the last part is written again with more lines, until it has PART_BYTES and the next one begins. The number of
files is thus bounded by the bytes and the sessions, whatever the number of events.

A session is acquired by creating its first part, which no other process can create too. An event of the kind `session` says
how much of each earlier file the process had read by then. What a process whose run was taken over writes later comes after the
new session in the order of events, so every process that reads the spool sees one order.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from minitron import storage
from minitron.storage import disk_errors, is_local, local_path
from minitron_platform.tracking.events import line, read_lines

NAME = re.compile(r"^(\d{6})\.(\d{6})\.jsonl$")
PART_BYTES = 1 << 19
CLOSED = -1  # in place of a descriptor, whose number may soon be that of another file
SESSION = "session"  # the kind of a session's first event, which belongs to no run


@dataclass(frozen=True)
class Portion:
    """Bytes of one part, from `start` to `end`."""

    name: str
    start: int
    end: int

    @property
    def session(self) -> int:
        """The session that wrote them."""
        return session_of(self.name)


def session_of(name: str) -> int:
    """The session that a part belongs to."""
    return int(name[:6])


def part_name(session: int, part: int) -> str:
    """Name of a part; both numbers start at 1."""
    return f"{session:06d}.{part:06d}.jsonl"


def part_sizes(folder: str) -> dict[str, int]:
    """The present sizes in bytes of all parts of a spool, in the order of their numbers."""
    sizes = storage.file_sizes(folder)
    return {name: sizes[name] for name in sorted(sizes) if NAME.match(name)}


def newest_session(folder: str) -> int:
    """The highest session of a spool; 0 if nothing was written."""
    return max((session_of(name) for name in storage.names(folder) if NAME.match(name)), default=0)


def read_part(folder: str, name: str) -> bytes:
    """A part, up to its last complete line."""
    data = storage.read_bytes(storage.join(folder, name))
    return data[: data.rfind(b"\n") + 1]


def in_order(parts: dict[str, bytes]) -> Iterator[Portion]:
    """The portions of all parts in the order of their events: before a session's, those that it had read.

    parts: the content of all parts by their names, sorted.
    """
    read = dict.fromkeys(parts, 0)
    for name, data in parts.items():
        if not name.endswith(".000001.jsonl"):
            continue
        for event, _ in read_lines(data[:PART_BYTES]):
            if event is not None and event["event"] != SESSION:
                break
            for earlier, size in (event or {}).get("read", {}).items():
                end = min(int(size), len(parts.get(earlier, b"")))
                if end > read.get(earlier, 0):
                    yield Portion(earlier, read[earlier], end)
                    read[earlier] = end
    for name in sorted(parts, key=lambda name: (-session_of(name), name)):  # late lines of earlier sessions come last
        if len(parts[name]) > read[name]:
            yield Portion(name, read[name], len(parts[name]))


def acquire_session(folder: str, after: int) -> int:
    """Create the first part of the next session after session `after`; returns its number."""
    session = after + 1
    while not _create(storage.join(folder, part_name(session, 1))):
        session = max(session, newest_session(folder)) + 1
    return session


def _create(path: str) -> bool:
    """Create the first part of a session; False if another process was faster. Only its owner can read a local one."""
    unique = line({"t": 0, "event": SESSION, "id": uuid.uuid4().hex})
    if not is_local(path):
        return storage.create_bytes(path, unique)
    with disk_errors(path):
        local_path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            storage.write_new(local_path(path), unique, mode=storage.PRIVATE)
        except FileExistsError:
            return False
    return True


class LocalPart:
    """A part on a local disk that lines are appended to."""

    def __init__(self, folder: str, name: str) -> None:
        self.name = name
        self.path = str(local_path(storage.join(folder, name)))
        with disk_errors(self.path):
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, storage.PRIVATE)
        self.size = os.fstat(self._file).st_size
        self._torn = False  # whether the last write ended in the middle of a line

    def add(self, data: bytes) -> None:
        """Append lines; a killed process loses none of them. Raises OSError if they are not stored."""
        data = b"\n" + data if self._torn else data
        written = os.write(self._file, data)
        self.size += written
        self._torn = written != len(data)
        if self._torn:
            raise OSError("the disk stored only a part of a line")

    def sync(self) -> int:
        """Make what was added durable; returns the size that is durable."""
        size = self.size
        os.fsync(self._file)
        return size

    def close(self) -> None:
        if self._file != CLOSED:
            os.close(self._file)
        self._file = CLOSED


class RemotePart:
    """A part in an object store, which is written again as a whole."""

    def __init__(self, folder: str, name: str) -> None:
        self.name = name
        self.path = storage.join(folder, name)
        self.content = bytearray()
        if name.endswith(".000001.jsonl"):  # it was created with the session
            self.content += storage.read_bytes(self.path)

    @property
    def size(self) -> int:
        return len(self.content)

    def add(self, data: bytes) -> None:
        """Add lines, in memory."""
        self.content += data

    def sync(self) -> int:
        """Make what was added durable; returns the size that is durable. Raises StorageError if that fails."""
        content = bytes(self.content)
        storage.write_bytes(self.path, content)
        return len(content)

    def close(self) -> None:
        """Nothing is open."""


def open_part(folder: str, session: int, part: int) -> LocalPart | RemotePart:
    """A part of one's own session, to add lines to."""
    kind = LocalPart if is_local(folder) else RemotePart
    return kind(folder, part_name(session, part))
