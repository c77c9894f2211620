"""The training curve, kept with the checkpoints: whole however often and on whatever machines a training is resumed."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

from minitron import storage
from minitron.errors import StorageError

_PART = re.compile(r"(\d{8})-(\d{8})\.jsonl")


@dataclass(frozen=True)
class Point:
    """The loss of one step, nats per token, and the divergence from the teacher in it where there is one."""

    step: int
    loss: float
    kl: float | None


class Curve:
    """The curve of one training whose checkpoints are in `checkpoints`; one process writes it.

    Object stores cannot append, so the points between two checkpoints are one JSON-lines file, named by the steps before its
    first and up to its last. Raises StorageError for a file that cannot be read or written.
    """

    def __init__(self, checkpoints: str) -> None:
        self._folder = storage.join(checkpoints, "curve")
        self._saved, self._points = 0, list[Point]()

    def resume(self, step: int) -> None:
        """Go on after `step`: what was written of later steps, which are trained again, is deleted."""
        for first, last in self._parts():
            if last > step:
                storage.remove(self._path(first, last))
        self._saved, self._points = step, []

    def add(self, point: Point) -> None:
        self._points.append(point)

    def save(self, step: int) -> None:
        """Write the points up to `step`; before the checkpoint of that step is committed, so that it is never without."""
        if step > self._saved:
            lines = "".join(json.dumps(asdict(point)) + "\n" for point in self._points)
            storage.write_bytes(self._path(self._saved, step), lines.encode())
            self._saved, self._points = step, []

    def points(self) -> list[Point]:
        """All saved points, by step; each step once, also where a process that was given up wrote some of them again."""
        points = {point.step: point for part in self._parts() for point in self._read(self._path(*part))}
        return [points[step] for step in sorted(points)]

    def _read(self, path: str) -> list[Point]:
        try:
            return [Point(**json.loads(line)) for line in storage.read_bytes(path).splitlines()]
        except (ValueError, TypeError) as error:
            raise StorageError(
                f"{path}: not a part of a training curve ({error})", "delete it and run again"
            ) from error

    def _parts(self) -> list[tuple[int, int]]:
        parts = (_PART.fullmatch(name) for name in storage.names(self._folder))
        return sorted((int(part[1]), int(part[2])) for part in parts if part)

    def _path(self, first: int, last: int) -> str:
        return storage.join(self._folder, f"{first:08d}-{last:08d}.jsonl")


def read_curve(checkpoints: str) -> list[Point]:
    """The curve of a training that has ended, from the folder of its checkpoints."""
    return Curve(checkpoints).points()
