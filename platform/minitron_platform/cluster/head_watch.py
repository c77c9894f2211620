"""Ends a run with an error for its user when the cluster's head is lost.

Ray itself ends a process that has not reached the head for a minute, from C++, with a message about its own logs. What the
process waits for in Ray until then cannot be interrupted. So a thread looks whether the head answers, and ends the process a
little earlier.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.markup import escape

from minitron.errors import MinitronError
from minitron_platform.addresses import answers
from minitron_platform.console import Console, print_error
from minitron_platform.fence import LeaseLostError

RAY_SECONDS = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Environment variable: how long Ray waits for the head, 60 by default."""
LOOK_SECONDS = 2.0
PATIENCE = 0.75  # share of Ray's wait after which the run ends; the rest is for its records
MENTIONED = 0.15  # share of Ray's wait after which the user hears of it
EXIT_CODE = 2  # that of other errors


class HeadLostError(MinitronError):
    """The head of the cluster does not answer any more."""


class HeadWatch:
    """Watches the head from `start` to the end of the block. If it is lost and stays so, the process ends with exit code 2, or
    the block with HeadLostError if it has failed before.

    console: shows messages, and names the command that continues the run. leave: what else is done before the process ends,
    without Ray; it is called in another thread than the block's.
    """

    def __init__(self, console: Console, leave: Callable[[], None]) -> None:
        self.console, self.leave = console, leave
        self.ray_seconds = float(os.environ.get(RAY_SECONDS, 60))
        self._address = ""
        self._ending = threading.Event()
        self._report = threading.Lock()  # held by the thread that tells the user

    def __enter__(self) -> HeadWatch:
        return self

    def start(self, address: str) -> None:
        """Begin to watch the head at HOST:PORT."""
        self._address = address
        threading.Thread(target=self._watch, name="minitron-head", daemon=True).start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ending.set()
        if not self._report.acquire(blocking=False):
            time.sleep(self.ray_seconds)  # the other thread ends the process
        failed = isinstance(error, Exception) and not isinstance(error, LeaseLostError)
        if failed and self._address and not answers(self._address, LOOK_SECONDS):
            raise self._error() from error

    def _watch(self) -> None:
        answered, mentioned = time.monotonic(), False
        while not self._ending.wait(LOOK_SECONDS):
            if answers(self._address, LOOK_SECONDS):
                if mentioned:
                    self.console.say(f"  [green]back[/]    the cluster's head at {escape(self._address)} answers again")
                answered, mentioned = time.monotonic(), False
                continue
            gone = time.monotonic() - answered
            if gone >= self.ray_seconds * MENTIONED and not mentioned:
                mentioned = True
                rest = max(0.0, self.ray_seconds * PATIENCE - gone)
                self.console.say(
                    f"  [yellow]lost[/]    the cluster's head at {escape(self._address)} does not answer; the run ends if it "
                    f"does not come back within {rest:.0f} s"
                )
            if gone >= self.ray_seconds * PATIENCE and self._report.acquire(blocking=False):
                self._end()

    def _error(self) -> HeadLostError:
        command = self.console.command
        again = f"otherwise the same command: {command}" if command else "otherwise the same recipe and settings"
        return HeadLostError(
            f"the head of the Ray cluster, at {self._address}, is lost: it does not answer, and the cluster ends with it",
            "start the cluster again. What is finished is in the storage: continue with the new cluster's address, if that is "
            f"another, and {again}",
        )

    def _end(self) -> None:
        """End this process. Ray would do so if it took longer."""
        self.console.release()
        print_error(self._error())
        thread = threading.Thread(target=self.leave, daemon=True)
        thread.start()
        thread.join(self.ray_seconds * (1 - PATIENCE) / 2)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODE)
