"""The training curve, stored with the checkpoints, so that it stays complete when a training is resumed on any machine."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

from minitron import storage
from minitron.arguments import check_type
from minitron.errors import StorageError

_PART = re.compile(r"(\d{8})-(\d{8})\.jsonl")


@dataclass(frozen=True)
class Point:
    """One training step: its loss, nats per token, and its divergence from the teacher (None without a teacher)."""

    step: int
    loss: float
    kl: float | None


class Curve:
    """The curve of one training, written by one process. checkpoints: the folder of the training's checkpoints.

    Object stores cannot append, so the points between two checkpoints are one JSON-lines file FIRST-LAST.jsonl with the points
    of the steps FIRST + 1 to LAST. Raises StorageError for a file that cannot be read or written.
    """

    def __init__(self, checkpoints: str) -> None:
        self._folder = storage.join(checkpoints, "curve")
        self._saved = 0  # step up to which the points are on disk
        self._points: list[Point] = []

    def resume(self, step: int) -> None:
        """Continue after `step`. The points of later steps are deleted, because these steps are trained again."""
        for first, last in self._parts():
            if last > step:
                storage.remove(self._path(first, last))
        self._saved = step
        self._points = []

    def add(self, point: Point) -> None:
        self._points.append(point)

    def save(self, step: int) -> None:
        """Write the points up to `step`. Call it before the checkpoint of that step is committed, so that every checkpoint has
        its curve."""
        if step > self._saved:
            lines = "".join(json.dumps(asdict(point)) + "\n" for point in self._points)
            storage.write_bytes(self._path(self._saved, step), lines.encode())
            self._saved = step
            self._points = []

    def points(self) -> list[Point]:
        """All saved points in the order of their steps. Each step occurs once, even if an abandoned process wrote it too."""
        points = {point.step: point for part in self._parts() for point in self._read(self._path(*part))}
        return [points[step] for step in sorted(points)]

    def _read(self, path: str) -> list[Point]:
        try:
            return [Point(**json.loads(line)) for line in storage.read_bytes(path).splitlines()]
        except (ValueError, TypeError, RecursionError) as error:
            raise StorageError(
                f"{path}: not a part of a training curve ({error})", "delete it and run again"
            ) from error

    def _parts(self) -> list[tuple[int, int]]:
        parts = (_PART.fullmatch(name) for name in storage.names(self._folder))
        return sorted((int(part[1]), int(part[2])) for part in parts if part)

    def _path(self, first: int, last: int) -> str:
        return storage.join(self._folder, f"{first:08d}-{last:08d}.jsonl")


def read_curve(checkpoints: str) -> list[Point]:
    """The curve of a finished training, from the folder of its checkpoints."""
    check_type("checkpoints", checkpoints, str, "the path of a folder")
    return Curve(checkpoints).points()
