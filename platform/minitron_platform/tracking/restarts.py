"""Records of workers of a stage and trials of a search that failed, and whether they were restarted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from rich.markup import escape

from minitron import storage
from minitron.errors import StorageError
from minitron_platform.tracking.spool import RunLog


@dataclass(frozen=True)
class Restart:
    """One failure of a worker or trial, and its restart if there was one."""

    time: str
    """When it failed, in UTC."""
    what: str
    """The worker or trial that failed."""
    node: str
    """Where it ran; empty if it failed before that was known."""
    reason: str
    step: int | None
    """The step that it resumed from; None if it did not resume."""
    left: int
    """Number of restarts that are left."""
    again: bool = False
    """Whether work without steps was started again, where it was."""

    def __str__(self) -> str:
        resumed = "started again" if self.again else "not resumed"
        if self.step is not None:
            resumed = f"resumed from step {self.step}"
        return f"{failed_text(self.what, self.node, self.reason)}; {resumed}, {left_text(self.left)}"


def failed_text(what: str, node: str, reason: str) -> str:
    """A failure as text, for example "worker 1 on node-2: out of memory"."""
    return f"{what}{f' on {node}' if node else ''}: {reason}"


def left_text(left: int) -> str:
    """For example "1 restart left"."""
    return f"{max(0, left)} restart{'' if left == 1 else 's'} left"


def now() -> str:
    """The current time in UTC, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())


def record_restart(log: RunLog, number: int, restart: Restart) -> None:
    """Add a restart to a run's record: the metric `restarts` and a tag. number: of the restart, from 1.

    The metric's step is the number too: several restarts may resume from one step of the training, and a step has one value.
    """
    log.metrics({"restarts": number}, step=number)
    log.tags({f"minitron.restart.{number}": f"{restart.time} UTC: {restart}"})


RESTARTS = "restarts.json"  # in the stage's folder


def read_restarts(path: str) -> list[Restart]:
    """The restarts in a file that `write_restarts` wrote; empty if it does not exist."""
    return [Restart(**values) for values in storage.read_json_if_exists(path) or ()]


def write_restarts(path: str, restarts: Sequence[Restart]) -> None:
    """Write restarts to a JSON file."""
    storage.write_json(path, [asdict(restart) for restart in restarts])


class Restarts:
    """All restarts of a stage's workers, those of earlier drivers too, as a file and in the stage's record.

    path: of the file. before_commit: called before it is written, see `Worker.before_commit`. say: prints a line for the user.
    """

    def __init__(
        self, log: RunLog, path: str, *, before_commit: Callable[[], None], say: Callable[[str], None]
    ) -> None:
        self.log = log
        self.path = path
        self.before_commit = before_commit
        self.say = say
        self.known = read_restarts(path)

    def add(self, restart: Restart) -> None:
        """Store a failure as soon as it is known: the driver may be gone before it is known what follows."""
        self.known.append(restart)
        self._store()

    def replace_latest(self, restart: Restart) -> None:
        """Store the latest failure again, with what has followed."""
        self.known[-1] = restart
        self._store()

    def _store(self) -> None:
        record_restart(self.log, len(self.known), self.known[-1])
        self.before_commit()
        try:
            write_restarts(self.path, self.known)
        except StorageError as error:
            self.say(f"  [yellow]the restart will be missing in the report[/]: {escape(error.problem)}")
