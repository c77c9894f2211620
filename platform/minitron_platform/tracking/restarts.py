"""Work that failed and was started again: a worker of a training, or a trial of a search."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from minitron import storage
from minitron_platform.tracking.spool import RunLog


@dataclass(frozen=True)
class Restart:
    """`what` failed on `node` at `time` (UTC) for `reason`; it went on after `step` steps, with `left` restarts to spare.

    `node` is empty if the failure came before it was known, `step` is None if the next failure came before it went on.
    """

    time: str
    what: str
    node: str
    reason: str
    step: int | None
    left: int

    def __str__(self) -> str:
        resumed = "not resumed" if self.step is None else f"resumed from step {self.step}"
        return f"{failed_text(self.what, self.node, self.reason)}; {resumed}, {left_text(self.left)}"


def failed_text(what: str, node: str, reason: str) -> str:
    return f"{what}{f' on {node}' if node else ''}: {reason}"


def left_text(left: int) -> str:
    return f"{max(0, left)} restart{'' if left == 1 else 's'} left"


def now() -> str:
    """UTC, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())


def record_restart(log: RunLog, number: int, restart: Restart) -> None:
    """Add the restart with this number, from 1, to a run's record: the metric `restarts`, and a tag that tells of it."""
    log.metrics({"restarts": number}, step=restart.step or 0)
    log.tags({f"minitron.restart.{number}": f"{restart.time} UTC: {restart}"})


def read_restarts(path: str) -> list[Restart]:
    """Restarts that `write_restarts` kept; none if there is no such file."""
    return [Restart(**values) for values in storage.read_json(path)] if storage.exists(path) else []


def write_restarts(path: str, restarts: Sequence[Restart]) -> None:
    storage.write_json(path, [asdict(restart) for restart in restarts])
