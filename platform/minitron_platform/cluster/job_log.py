"""What the output of a run says about it: its stages, its progress, and why it failed.

A run prints these lines itself, see `minitron_platform.pipeline` and `minitron_platform.console`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FINISHED = re.compile(r"^✓ (\S+)", re.MULTILINE)  # the last line of a stage
_WORKING = re.compile(r"^  … (\S+)  (.*)$", re.MULTILINE)  # a heartbeat: the stage, its status and its age
_ENDED = re.compile(r"^total time ", re.MULTILINE)  # the last line of a run that has finished all stages
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b.*$", re.MULTILINE)


@dataclass(frozen=True)
class Progress:
    """Where a run is."""

    stage: str
    """What it works on, or the last stage that it finished; empty at its very start."""
    status: str
    """For example "3/8 trials · 20 s left · 1 min 10 s", or "done"."""

    def __str__(self) -> str:
        return " ".join(filter(None, [self.stage, self.status]))


def progress(log: str) -> Progress:
    """The newest progress in the output of a run."""
    finished = _last(_FINISHED, log)
    working = _last(_WORKING, log)
    ended = _last(_ENDED, log)
    over = [match.start() for match in (finished, ended) if match]
    if working and working.start() > max(over, default=-1):
        return Progress(working[1], working[2].strip())
    return Progress(finished[1], "done") if finished else Progress("", "")


def failure(log: str) -> str:
    """The error that ended a run, as one line: its problem and remedy, or the last exception; empty if there is none."""
    lines = log.splitlines()
    for number in range(len(lines) - 1, -1, -1):
        if lines[number].startswith("error: "):
            remedy = lines[number + 1] if number + 1 < len(lines) else ""
            return "; ".join(
                [lines[number].removeprefix("error: "), *remedy.strip().removeprefix("fix: ").splitlines()]
            )
    last = _last(_EXCEPTION, log)
    return last[0] if last else ""


def stage_log(log: str, stage: str) -> str:
    """The part of a run's output that it printed during `stage`; empty if it has not printed that it worked on it.

    For a family of several models, the parts of all of them.
    """
    parts = []
    begin = 0
    for end in _FINISHED.finditer(log):
        line_end = log.find("\n", end.start()) + 1 or len(log)
        if end[1] == stage:
            parts.append(log[begin:line_end])
        begin = line_end
    rest = log[begin:]
    if any(working[1] == stage for working in _WORKING.finditer(rest)):
        parts.append(rest)
    return "".join(parts)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = None
    for found in pattern.finditer(text):  # noqa: B007
        pass
    return found
