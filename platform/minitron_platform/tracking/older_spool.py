"""Records of earlier versions, which kept one `<key>.jsonl` per run in a local folder, moved into a spool of today."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from minitron import storage
from minitron.errors import StorageError
from minitron.storage import is_local, local_path
from minitron_platform.tracking.events import KEY, Event, line, read_lines
from minitron_platform.tracking.parts import NAME, acquire_session, newest_session, part_name
from minitron_platform.tracking.sent import Sent

log = logging.getLogger(__name__)

STATE = ".sent.json"  # how much of each file was in MLflow
LOCK = ".lock"


def import_older(older: str, folder: str) -> None:
    """Move the records in the local folder `older` into the spool `folder`, and note which of them are in MLflow.

    Does nothing if there are none. If it is interrupted, the next call repeats it, which adds no metric point twice.
    Raises StorageError if the spool cannot be written.
    """
    if not is_local(older) or not local_path(older).is_dir():
        return
    files = [path for path in sorted(local_path(older).glob("*.jsonl")) if not NAME.match(path.name)]
    if not files:
        return
    state = _state(local_path(older) / STATE)
    sent, unsent = list[Event](), list[Event]()
    points: set[tuple[str, int, str]] = set()
    for path in files:
        if not KEY.match(path.stem):
            log.warning("%s is not a record and is left where it is", path)
            continue
        boundary = state.get("offsets", {}).get(path.stem, 0)
        for event, offset in read_lines(path.read_bytes(), path.stem):
            if event is None:
                continue
            if event["event"] == "artifact":  # the storage has a copy
                event["path"] = event["path"].removeprefix(f"{local_path(older).parent}/")
            if event["event"] == "metrics":  # those versions recorded some points twice
                event["values"] = {
                    n: v for n, v in event["values"].items() if (path.stem, event["step"], n) not in points
                }
                points.update((path.stem, event["step"], name) for name in event["values"])
            (sent if offset <= boundary else unsent).append(event)
    _write(folder, sent, unsent, state.get("store", []))
    for path in (*files, local_path(older) / STATE, local_path(older) / LOCK):
        if KEY.match(path.stem):
            path.unlink(missing_ok=True)
    log.warning("records of an earlier version were moved from %s to %s", older, folder)


def _write(folder: str, sent: list[Event], unsent: list[Event], store: list[Any]) -> None:
    """Write the events as a session of the spool `folder`, those that MLflow has first, and how many they are."""
    name = part_name(acquire_session(folder, newest_session(folder)), 1)
    begin = storage.read_bytes(storage.join(folder, name)) + b"".join(map(line, sent))
    storage.write_bytes(storage.join(folder, name), begin + b"".join(map(line, unsent)))
    if store:
        positions = Sent(folder, store)
        positions.offsets[name] = len(begin)
        positions.save()


def _state(path: Path) -> dict[str, Any]:
    """The content of a state file; empty if there is none, or if it is damaged."""
    if not path.exists():
        return {}
    try:
        state = storage.read_json(str(path))
    except StorageError:
        return {}
    return state if isinstance(state, dict) else {}
