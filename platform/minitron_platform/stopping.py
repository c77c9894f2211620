"""SIGTERM stops a program as Ctrl-C does: what it has begun is closed, and its exit code says what has stopped it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # exit code after Ctrl-C, as shells give it


class TerminatedError(SystemExit):
    """SIGTERM has stopped the program, whose exit code is 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt inside the block, which then ends with TerminatedError.

    Ray and other libraries pass KeyboardInterrupt on, but not every exception. Further SIGTERMs change nothing: schedulers and
    shells send several, and closing takes seconds. Does nothing if the program handles SIGTERM already, or outside the main
    thread, where Python allows no handler.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    received = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if not received:
            received = True
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except SystemExit:  # the block has ended by itself
        raise
    except BaseException as error:
        if received:
            raise TerminatedError from error
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
