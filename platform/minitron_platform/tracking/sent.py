"""How much of a spool is in MLflow."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from minitron import storage
from minitron.errors import StorageError, one_line

log = logging.getLogger(__name__)

SENT = "sent-"  # begins the names of the files
SAVE_SECONDS = 5.0  # shortest time between two saves during a run


class Sent:
    """The offset up to which each part of the spool `folder` was sent to one MLflow experiment, in a JSON file of the spool.

    store: identifies the experiment and its database; each has a file of its own.
    """

    def __init__(self, folder: str, store: list[Any]) -> None:
        self.path = storage.join(folder, f"{SENT}{storage.fingerprint(store)[:8]}.json")
        self._saved_at = float("-inf")
        self.offsets = _read(self.path) if storage.exists(self.path) else {}
        self._saved = dict(self.offsets)

    def save(self) -> None:
        """Write the file if anything has changed. Raises StorageError if the storage does not answer."""
        if self.offsets != self._saved:
            text = json.dumps(self.offsets, indent=1, sort_keys=True) + "\n"
            storage.write_bytes(self.path, text.encode(), private=True)
            self._saved = dict(self.offsets)
            self._saved_at = time.monotonic()

    def save_at_times(self) -> None:
        """Save, but not more often than every SAVE_SECONDS: what is sent again after a crash changes nothing in MLflow."""
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()


def known_offsets(folder: str) -> dict[str, int]:
    """The offset up to which each part of a spool was sent to any MLflow."""
    offsets: dict[str, int] = {}
    for name in storage.names(folder):
        if name.startswith(SENT):
            for part, offset in _read(storage.join(folder, name)).items():
                offsets[part] = max(offset, offsets.get(part, 0))
    return offsets


def _read(path: str) -> dict[str, int]:
    """The offsets in a file; empty if it is damaged."""
    try:
        return {str(name): int(offset) for name, offset in storage.read_json(path).items()}
    except (StorageError, AttributeError, TypeError, ValueError) as error:
        log.warning("%s is damaged, so all records are sent again (this changes nothing): %s", path, one_line(error))
        return {}
