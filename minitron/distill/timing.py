"""Measurement of the time that each part of a training step takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PARTS = ("data", "teacher", "student", "loss", "optimizer", "checkpoint", "evaluation", "report")


class Stopwatch:
    """Seconds by part of a step. A lap is the time since the lap before it, so the laps add up to the whole time.

    On a GPU laps are CUDA events, read only by `seconds`, so that measuring does not make the host wait. Time that the host
    spends while the GPU is busy is not counted separately.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._paused = False
        self.restart()

    def lap(self, part: str) -> None:
        """Add the time since the last lap to `part`, one of `PARTS`."""
        if not self._paused:
            self._laps.append(part)
            self._marks.append(self._mark())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the context laps are not added; the next one after it has their time."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def restart(self) -> None:
        """Discard all laps and start the next one now."""
        self._laps: list[str] = []
        self._marks = [self._mark()]

    def seconds(self) -> dict[str, float]:
        """Seconds of each part in `PARTS` from the previous call to the last lap; waits for the GPU."""
        if self.cuda:
            self._marks[-1].synchronize()
        totals = dict.fromkeys(PARTS, 0.0)
        for part, before, after in zip(self._laps, self._marks, self._marks[1:], strict=False):
            totals[part] += before.elapsed_time(after) / 1000 if self.cuda else after - before
        self._laps = []
        self._marks = self._marks[-1:]
        return totals

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
