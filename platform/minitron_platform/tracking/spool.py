"""Records of runs on the local disk, written before anything is sent to MLflow.

A spool is a folder on the node's own disk with one append-only `<key>.jsonl` per run. A line is one event:

    {"t": 1767225600000, "event": "metrics", "step": 40, "values": {"loss": 2.5, "grad_norm": "nan"}}

`t` is the Unix time in milliseconds; NaN and infinities are strings, so that every line is standard JSON. Each line is appended
with one write, so several processes of the node may write to the same file. If a process is killed, everything that it wrote is
kept; a power failure loses what the operating system had not written to the disk yet.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from minitron.errors import InputError
from minitron.storage import PRIVATE, is_local, local_path

log = logging.getLogger(__name__)

KEY = re.compile(r"^[A-Za-z0-9._-]+$")
READ_BYTES = 4 << 20  # of one read; bounds the memory of a pass of the sender
NAME_LENGTH = 250  # MLflow's limit for the name of a metric, parameter or tag, in characters
Status = Literal["FINISHED", "FAILED", "KILLED"]


class RunLog:
    """Writes the record of one run. Keeps no file open, and can be pickled and sent to other processes of the node.

    spool: the folder. key: identifies the run in the spool and, as the tag `minitron.key`, in the MLflow experiment.
    The methods never raise: if the disk refuses a write, one warning is logged, and `lost` counts the events.
    Raises InputError for a key with other characters than letters, digits, dot, underscore and dash.
    """

    def __init__(self, spool: str, key: str) -> None:
        self.spool = str(spool_folder(spool))
        self.key = check_key(key)
        self.lost = 0

    @property
    def path(self) -> Path:
        """The file of the record; it exists once something was written."""
        return Path(self.spool) / f"{self.key}.jsonl"

    def start(self, name: str, parent: str | None = None, tags: Mapping[str, Any] | None = None) -> None:
        """Record that the run starts, or continues after it had ended. parent: key of its parent run in MLflow."""
        if parent is not None:
            check_key(parent)
        self._append({"event": "start", "name": name, "parent": parent, "tags": _strings(tags or {})})

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters of the run, as text. MLflow keeps the first value; a later one becomes the tag `changed.<name>`."""
        self._append({"event": "params", "values": _strings(values)})

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Record numbers at a step; values are converted by float()."""
        numbers = {mlflow_name(name): _number(float(value)) for name, value in values.items()}
        self._append({"event": "metrics", "step": int(step), "values": numbers})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Record tags of the run, as text; MLflow keeps the last value."""
        self._append({"event": "tags", "values": _strings(values)})

    def artifact(self, local_path: str, folder: str = "") -> None:
        """Record a file or folder of this node as an artifact below `folder`. It must not be deleted before it is uploaded."""
        self._append({"event": "artifact", "path": os.path.abspath(local_path), "folder": folder})

    def end(self, status: Status = "FINISHED") -> None:
        """Record that the run ended."""
        self._append({"event": "end", "status": status})

    def _append(self, event: dict[str, Any]) -> None:
        line = json.dumps({"t": time.time_ns() // 1_000_000, **event}, allow_nan=False).encode() + b"\n"
        try:
            os.makedirs(self.spool, mode=0o700, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, PRIVATE)
            try:
                size = os.fstat(file).st_size
                if size and os.pread(file, 1, size - 1) != b"\n":
                    line = b"\n" + line  # another process was killed in the middle of a line
                if os.write(file, line) != len(line):
                    raise OSError("the disk stored only a part of the line")
            finally:
                os.close(file)
        except OSError as error:
            self.lost += 1
            if self.lost == 1:
                log.warning("%s: the record of run %r is being lost: %s", self.spool, self.key, error)


def spool_folder(spool: str) -> Path:
    """The local path of a spool. Raises InputError for a remote address."""
    if not is_local(spool):
        raise InputError(f"spool {spool!r} is not a local folder", "give a folder on this machine's disk")
    return local_path(spool)


def check_key(key: str) -> str:
    """Return `key`, if it is a valid run key. Raises InputError if it is not."""
    if not KEY.match(key):
        raise InputError(
            f"run key {key!r} has characters that are not allowed", "use letters, digits, '.', '_' and '-'"
        )
    return key


def mlflow_name(name: str) -> str:
    """`name` with characters that MLflow does not allow in names replaced: lm-eval's `acc,none` becomes `acc_none`."""
    return re.sub(r"/+", "/", re.sub(r"[^\w.\- :/]", "_", name)).strip("/")[:NAME_LENGTH]


def keys(spool: Path) -> list[str]:
    """The keys of the runs in a spool, sorted."""
    return sorted(path.stem for path in spool.glob("*.jsonl"))


def read_events(path: Path, offset: int) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """Yield `(event, byte offset after its line)` for the complete lines from byte `offset` on; the event of a damaged line is
    None. A last line without a line break is not read, because it is still being written."""
    with open(path, "rb") as file:
        file.seek(offset)
        rest = b""
        while block := file.read(READ_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                offset += len(line) + 1
                if line.strip():
                    yield _parse(line), offset


def recorded_steps(log: RunLog, metric: str) -> set[int]:
    """The steps at which a record has the metric `metric`."""
    events = read_events(log.path, 0) if log.path.exists() else ()
    return {e["step"] for e, _ in events if e and e["event"] == "metrics" and metric in e["values"]}


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):  # incomplete JSON, or not UTF-8
        return None
    return event if isinstance(event, dict) and "event" in event and "t" in event else None


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _strings(values: Mapping[str, Any]) -> dict[str, str]:
    return {mlflow_name(name): str(value) for name, value in values.items()}
