"""Restarts of a search's trials, stored beside the trials: a driver that continues the search knows those of earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict

from rich.markup import escape

from minitron import storage
from minitron.architecture import Architecture
from minitron.errors import StorageError
from minitron_platform.tracking.restarts import Restart
from minitron_search.trial_store import trial_key

FILE = "restarts.json"  # in the folder of the trials: by trial, the fields of its restarts


class TrialRestarts:
    """All restarts of the trials in `folder`.

    before_commit: called before the file is written, see `Worker.before_commit`. say: prints a line for the user.
    """

    def __init__(self, folder: str, *, before_commit: Callable[[], None], say: Callable[[str], None]) -> None:
        self.path = storage.join(folder, FILE)
        self.before_commit = before_commit
        self.say = say
        stored = storage.read_json_if_exists(self.path) or {}
        self._known = {key: [Restart(**values) for values in restarts] for key, restarts in stored.items()}

    def add(self, architecture: Architecture, restart: Restart) -> int:
        """Store a restart; returns its number among those of the trial, from 1."""
        own = self._known.setdefault(trial_key(architecture), [])
        own.append(restart)
        self.before_commit()
        try:
            storage.write_json(self.path, {key: list(map(asdict, known)) for key, known in self._known.items()})
        except StorageError as error:
            self.say(f"  [yellow]the restart will be missing in a later run's report[/]: {escape(error.problem)}")
        return len(own)

    def of(self, architectures: Iterable[Architecture]) -> tuple[Restart, ...]:
        """The restarts of these candidates' trials, in the order of time."""
        known = [restart for architecture in architectures for restart in self._known.get(trial_key(architecture), ())]
        return tuple(sorted(known, key=lambda restart: restart.time))
