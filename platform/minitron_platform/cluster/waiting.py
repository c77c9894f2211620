"""A small process that waits until another one ends."""

from __future__ import annotations

import sys

WAIT = "import sys; sys.stdin.buffer.read()"


def waiting(then: str = "") -> list[str]:
    """A command that waits until its input ends, as it does when the process that holds the other end is killed, and then
    carries out the Python statements `then`, which may read further arguments in `sys.argv[1:]`.

    It needs no program but Python, whose libraries it does not import: there may be no shell, or none in PATH.
    """
    return [sys.executable, "-I", "-S", "-c", f"{WAIT}; {then}" if then else WAIT]
