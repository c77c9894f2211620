"""Time of a training step by part."""

from __future__ import annotations

import time
from typing import Any

import torch

PARTS = ("data", "teacher", "student", "loss", "optimizer", "checkpoint", "evaluation", "report")


class Stopwatch:
    """Seconds by part, without a gap: each lap is the time since the one before.

    On a GPU laps are events in its stream that are read when the seconds are asked for, so that measuring never makes the
    host wait in between; what the host does while the GPU is busy costs nothing and counts nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.restart()

    def lap(self, part: str) -> None:
        """Count the time since the last lap to `part`, one of `PARTS`."""
        self._laps.append(part)
        self._marks.append(self._mark())

    def restart(self) -> None:
        """Forget all laps; the next one begins now."""
        self._laps: list[str] = []
        self._marks = [self._mark()]

    def seconds(self) -> dict[str, float]:
        """Seconds of each part in `PARTS` up to the last lap since the last call; waits for the GPU."""
        if self.cuda:
            self._marks[-1].synchronize()
        totals = dict.fromkeys(PARTS, 0.0)
        for part, before, after in zip(self._laps, self._marks, self._marks[1:], strict=False):
            totals[part] += before.elapsed_time(after) / 1000 if self.cuda else after - before
        self._laps, self._marks = [], self._marks[-1:]
        return totals

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
