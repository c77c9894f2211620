"""Events of runs, each a line of JSON.

    {"t": 1767225600000, "key": "tiny-1f.distill", "event": "metrics", "step": 40, "values": {"loss": 2.5, "grad_norm": "nan"}}

`t` is the Unix time in milliseconds and `key` the run's. NaN and infinities are strings, so that every line is standard JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from minitron.errors import InputError

KEY = re.compile(r"^[A-Za-z0-9._-]+$")
NAME_LENGTH = 250  # MLflow's limit for the name of a metric, parameter or tag, in characters
Status = Literal["FINISHED", "FAILED", "KILLED"]
Event = dict[str, Any]

BENCHMARK_TAG = "minitron.benchmark."  # followed by a benchmark's name; the metric, and what it was measured on
STATE_TAG = "minitron.state"  # of a trial, which is open in MLflow until its search ends
TRAINING = "training"  # its value while it trains; others say why it does not
FIELDS: dict[str, dict[str, type]] = {  # of each kind of event
    "session": {},
    "start": {"key": str, "name": str, "tags": dict},
    "params": {"key": str, "values": dict},
    "metrics": {"key": str, "values": dict, "step": int},
    "tags": {"key": str, "values": dict},
    "artifact": {"key": str, "path": str, "folder": str},
    "dataset": {"key": str, "name": str, "digest": str, "source": str, "context": str, "tokens": int},
    "end": {"key": str, "status": str},
}


def check_key(key: str) -> str:
    """Return `key`, if it is a valid run key. Raises InputError if it is not."""
    if not KEY.match(key):
        raise InputError(
            f"run key {key!r} has characters that are not allowed", "use letters, digits, '.', '_' and '-'"
        )
    return key


def status_of(error: BaseException) -> Status:
    """The status of what `error` has ended: KILLED if somebody stopped it, by Ctrl-C or SIGTERM."""
    return "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"


def mlflow_name(name: str) -> str:
    """`name` with characters that MLflow does not allow in names replaced: lm-eval's `acc,none` becomes `acc_none`."""
    return re.sub(r"/+", "/", re.sub(r"[^\w.\- :/]", "_", name)).strip("/")[:NAME_LENGTH]


def numbers(values: Mapping[str, Any]) -> dict[str, float | str]:
    """Values of metrics as they are written: float, or text if it is not finite."""
    converted = {mlflow_name(name): float(value) for name, value in values.items()}
    return {name: value if math.isfinite(value) else str(value) for name, value in converted.items()}


def strings(values: Mapping[str, Any]) -> dict[str, str]:
    """Values of parameters and tags as they are written."""
    return {mlflow_name(name): str(value) for name, value in values.items()}


def line(event: Event) -> bytes:
    """The line of an event, with its line break."""
    return json.dumps(event, allow_nan=False).encode() + b"\n"


def read_lines(data: bytes, key: str = "") -> Iterator[tuple[Event | None, int]]:
    """Yield `(event, offset after its line)` for the complete lines of `data`; the event of a damaged line is None.

    A last line without a line break is left out, because it may still be being written. key: of events that have none.
    """
    offset = 0
    while end := data.find(b"\n", offset) + 1:
        text = data[offset:end]
        offset = end
        if text.strip():
            yield _parse(text, key), offset


def _parse(text: bytes, key: str) -> Event | None:
    try:
        event = json.loads(text)
    except (ValueError, RecursionError):  # incomplete JSON, or not UTF-8
        return None
    if not isinstance(event, dict) or event.get("event") not in FIELDS or not isinstance(event.get("t"), int):
        return None
    if key:
        event["key"] = key
    fields = FIELDS[event["event"]]
    complete = all(isinstance(event.get(field), kind) for field, kind in fields.items())
    return event if complete and KEY.match(event.get("key", "session")) else None
