"""SIGTERM stops a program as Ctrl-C does: what it has begun is closed, and its exit code says what has stopped it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from minitron.errors import MinitronError

INTERRUPTED = 128 + signal.SIGINT  # exit code after Ctrl-C, as shells give it


class TerminatedError(SystemExit):
    """SIGTERM has stopped the program, whose exit code is 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt inside the block as SIGINT does. The block then ends with TerminatedError after
    SIGTERM, and after SIGINT with KeyboardInterrupt or a MinitronError.

    A library that is interrupted while it is imported or computes may raise any exception instead. Ray and other libraries pass
    KeyboardInterrupt on, but not every exception. Further SIGTERMs change nothing: schedulers and shells send several, and
    closing takes seconds. Does nothing if the program handles SIGTERM already, or outside the main thread, where Python
    allows no handler; SIGINT is left to a program that handles it.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    received: set[int] = set()

    def interrupt(number: int, frame: FrameType | None) -> None:
        first = number not in received
        received.add(number)
        if first or number == signal.SIGINT:
            raise KeyboardInterrupt

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except SystemExit:  # the block has ended by itself
        raise
    except BaseException as error:
        if signal.SIGTERM in received:
            raise TerminatedError from error
        if signal.SIGINT in received and not isinstance(error, MinitronError):  # such as a lease's that was lost
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
