"""Trainings in alternation: each in a process of its own, which pauses after a number of steps until it is told to continue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import memory_now, peak_memory, restart_peak, seconds_now

# of CUDA's allocator, and of the CPU's
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


class EndedEarly(Exception):
    """A training ended before its last step."""

    def __init__(self, log: Path, code: int) -> None:
        end = "\n".join(log.read_text().splitlines()[-15:])
        super().__init__(f"{log.name}: the training ended early, exit code {code}\n{end}")
        killed = code == -signal.SIGKILL  # as the system does where main memory is short
        self.out_of_memory = killed or any(words in end.lower() for words in _OUT_OF_MEMORY)


class Finished(Exception):
    """No more steps are requested."""


class Turns:
    """In the process of the training: answers after the warm-up steps, then after every `steps` requested steps."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.left, self.steps = warm_up, steps
        self.first_loss: float | None = None
        # other output goes to the log
        self.answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self.before = memory_now()
        restart_peak()
        self.started = seconds_now()

    def stepped(self, metrics: dict[str, Any]) -> None:
        """Count a step; raises Finished after the last. The answer has the values `metrics` of the step and the first loss."""
        if self.first_loss is None:
            self.first_loss = metrics.get("loss")
        self.left -= 1
        if self.left:
            return
        seconds = seconds_now() - self.started
        measured = {"seconds": seconds, "peak": peak_memory() - self.before, "first_loss": self.first_loss}
        print(json.dumps(metrics | measured), file=self.answers, flush=True)
        if not sys.stdin.readline():
            raise Finished
        self.left = self.steps
        self.started = seconds_now()


class Worker:
    """In the measuring process: one training, warmed up when this returns. Raises EndedEarly if it ends."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self._answer()

    def turn(self) -> dict[str, Any]:
        """Let it train for one round of steps; returns its answer, with the "seconds" of the steps and the "peak" bytes."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EndedEarly(self.log, self.process.wait())
        answer: dict[str, Any] = json.loads(line)
        return answer
