"""Which metric points the records of a run have: every point is recorded once, however often it is measured again.

A point is identified by its run, its metric's name, its step, and the work that it belongs to (`of`), such as a stage's
fingerprint: steps that are trained again after a failure have the identity of the first time. Points of records without `of`
belong to any work.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable


class _Series:
    """The points of one metric, by step. Arrays, because a search records millions of points."""

    __slots__ = ("owners", "steps", "times")

    def __init__(self) -> None:
        self.steps = array("q")
        self.times = array("q")
        self.owners = array("L")

    def find(self, step: int) -> int | None:
        """The index of a step; None if there is no point."""
        index = bisect_left(self.steps, step)
        return index if index < len(self.steps) and self.steps[index] == step else None

    def add(self, step: int, time_ms: int, owner: int) -> None:
        index = bisect_left(self.steps, step)
        self.steps.insert(index, step)
        self.times.insert(index, time_ms)
        self.owners.insert(index, owner)


class Points:
    """The points of all runs of a spool. Each has an owner, the session of the spool that recorded it first."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, str, str], _Series] = {}

    def owner(self, key: str, name: str, of: str, step: int) -> int | None:
        """The session that recorded a point of run `key` first; None if nobody has."""
        for work in {of, ""}:
            series = self._series.get((key, name, work))
            index = None if series is None else series.find(step)
            if series is not None and index is not None:
                return series.owners[index]
        return None

    def add(self, key: str, name: str, of: str, step: int, time_ms: int, owner: int) -> None:
        """Add a point that is not there."""
        self._series.setdefault((key, name, of), _Series()).add(step, time_ms, owner)

    def give(self, key: str, name: str, of: str, step: int, owner: int) -> None:
        """Change the owner of a point that is there."""
        for work in {of, ""}:
            series = self._series.get((key, name, work))
            index = None if series is None else series.find(step)
            if series is not None and index is not None:
                series.owners[index] = owner

    def fitting_time(self, key: str, names: Iterable[str], of: str, step: int, now: int) -> int:
        """`now`, or the nearest time that keeps points in the order of their steps, in milliseconds.

        MLflow orders the points of a metric by time. A step that is recorded later than the ones after it, because its first
        record was lost, gets the time of the step before it; the clock of another machine may be behind.
        """
        earliest, latest = 0, None
        for name in names:
            for work in {of, ""}:
                series = self._series.get((key, name, work))
                if series is None:
                    continue
                index = bisect_left(series.steps, step)
                if index:
                    earliest = max(earliest, series.times[index - 1])
                if index < len(series.steps):
                    latest = series.times[index] if latest is None else min(latest, series.times[index])
        return max(earliest, now if latest is None else min(now, latest))
