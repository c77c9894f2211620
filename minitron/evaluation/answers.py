"""Answers of a model that are kept in a storage, so that an evaluation is resumed, and repeated without computing.

They are kept by batch, because a batch is what is computed together: a resumed evaluation gives the scores of one that was not
interrupted, bit for bit. A batch is named by its requests, and its folder by the model and the task.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from minitron import storage
from minitron.processes import from_first, own_rank

log = logging.getLogger(__name__)

FLUSH_SECONDS = 30.0  # of work that is lost at most when a process is killed
VERSION = 1  # raised when an answer to the same requests changes by more than rounding


@dataclass
class Answers:
    """The answers to the requests of one task, in a folder of a storage.

    Each process of an evaluation has one. `known` is what was stored when it was opened, the same in all processes.
    """

    folder: str
    known: dict[str, Any]
    _new: dict[str, Any] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)

    def add(self, batch: str, answers: Any) -> None:
        """Keep the answers of a batch, a JSON value; written after FLUSH_SECONDS, and by `flush`."""
        self._new[batch] = answers
        if time.monotonic() - self._since >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        if self._new:
            name = f"{storage.fingerprint(sorted(self._new))}.json"
            storage.write_json(storage.join(self.folder, name), self._new)
        self._new, self._since = {}, time.monotonic()


@dataclass(frozen=True)
class AnswerStore:
    """The folder of all answers, and the model that gives them.

    model: hash of its weights, config and tokenizer (`minitron.checkpoints.identity`). settings: a JSON value with everything
    else that decides its answers, such as the dtype.
    """

    folder: str
    model: str
    settings: Any = None

    def open(self, task: Any, together: bool) -> Answers:
        """The answers to the requests of a task. task: a JSON value that names it. All processes of `together` call this."""
        key = storage.fingerprint([VERSION, self.settings, task])
        folder = storage.join(self.folder, self.model, key)
        content = b"{}"
        if own_rank(together) == 0:
            content = json.dumps(_read(folder)).encode()
        return Answers(folder, json.loads(from_first(content, together)))


def batch_name(requests: Iterable[bytes]) -> str:
    """Equal for equal requests in the same order; 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(len(request).to_bytes(8, "big"))
        digest.update(request)
    return digest.hexdigest()[:32]


def _read(folder: str) -> dict[str, Any]:
    """The answers in all files of a folder. A damaged file is deleted with a warning: what it held is computed again."""
    known: dict[str, Any] = {}
    for name in storage.names(folder):
        if name.endswith(".json") and not name.startswith("."):
            path = storage.join(folder, name)
            content = storage.read_bytes_if_exists(path)
            if content is None:  # another process found it damaged
                continue
            try:
                values = json.loads(content)
            except (ValueError, RecursionError):
                values = None
            if isinstance(values, dict):
                known |= values
            else:
                log.warning("%s: is damaged; it is deleted, and its answers are computed again", storage.redact(path))
                storage.remove(path)
    return known
