"""What is stored of all trials of a search, each file read once, and listed rather than asked for one by one.

A search has thousands of trials, and each question to an object store takes tens of milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from minitron import storage
from minitron.architecture import Architecture
from minitron_search.trial_store import (
    FORWARD_FILE,
    RESULT_FILE,
    WEIGHTS,
    ForwardScore,
    TrialResult,
    drop_weights,
    forward_score,
    rung_file,
    rung_result,
    trial_key,
    trial_result,
)

READERS = 16  # threads; of a request to an object store most is waiting
T = TypeVar("T")


class StoredTrials:
    """The measurements and results below a search's `folder` as they were at the last `refresh`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._files: frozenset[str] = frozenset()
        self._results: dict[Architecture, TrialResult] = {}
        self._forward: dict[Architecture, ForwardScore] = {}
        self._rungs: dict[int, dict[Architecture, float]] = {}
        self.refresh()

    def refresh(self) -> None:
        """List the folder again, which takes a request for every thousand files."""
        self._files = frozenset(storage.file_sizes(self.folder))

    def results(
        self, architectures: Iterable[Architecture], rungs: Sequence[int] = ()
    ) -> dict[Architecture, TrialResult]:
        """The results of the finished trials that were measured at all of `rungs`."""
        found = self._read(self._results, architectures, RESULT_FILE, lambda a: trial_result(self.folder, a))
        for architecture, result in found.copy().items():
            if not result.rung_kl.keys() >= set(rungs):  # the trial is repeated, with a new result
                del found[architecture], self._results[architecture]
        return found

    def forward(self, architectures: Iterable[Architecture]) -> dict[Architecture, ForwardScore]:
        """The measurements before any training."""
        return self._read(self._forward, architectures, FORWARD_FILE, lambda a: forward_score(self.folder, a))

    def rung_kl(self, architectures: Iterable[Architecture], step: int) -> dict[Architecture, float]:
        """The KL of those that were measured after `step` steps; 0 is before any training."""
        if not step:
            return {architecture: score.kl for architecture, score in self.forward(architectures).items()}

        def kl(architecture: Architecture) -> float | None:
            rung = rung_result(self.folder, architecture, step)
            return None if rung is None else rung.kl

        return self._read(self._rungs.setdefault(step, {}), architectures, rung_file(step), kl)

    def drop_weights(self, architectures: Iterable[Architecture]) -> None:
        """Delete the distilled students of these candidates."""
        kept = {name.split("/", 1)[0] for name in self._files if name.split("/", 2)[1:2] == [WEIGHTS]}
        for architecture in architectures:
            if trial_key(architecture) in kept:
                drop_weights(self.folder, architecture)

    def _read(
        self,
        known: dict[Architecture, T],
        architectures: Iterable[Architecture],
        name: str,
        read: Callable[[Architecture], T | None],
    ) -> dict[Architecture, T]:
        """What `read` gives for each architecture that has a file of this name, in their order; `known` was read before."""
        wanted = list(architectures)
        missing = [a for a in wanted if a not in known and f"{trial_key(a)}/{name}" in self._files]
        if missing:
            with ThreadPoolExecutor(1 if storage.is_local(self.folder) else READERS) as readers:
                new = zip(missing, readers.map(read, missing), strict=True)
                known |= {architecture: value for architecture, value in new if value is not None}
        return {architecture: known[architecture] for architecture in wanted if architecture in known}
