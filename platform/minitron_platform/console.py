"""What the user sees while work goes on: one live line on a terminal, plain lines elsewhere, never silence."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

FILE_COLUMNS = 120  # of tables where the output is not a terminal
HEARTBEAT_SECONDS = 8.0  # longest silence where the output is not a terminal


class Console:
    """Lines, tables and the state of the work at hand. `status` may be set from any thread."""

    def __init__(self) -> None:
        self.rich = RichConsole(highlight=False)
        if not self.rich.is_terminal and "COLUMNS" not in os.environ:
            self.rich.width = FILE_COLUMNS
        self._status: Callable[[], str] = str
        self._name = ""
        self._since = time.monotonic()
        self._last_print = time.monotonic()
        self._lock = threading.Lock()

    def say(self, message: str = "") -> None:
        with self._lock:
            self._last_print = time.monotonic()
            self.rich.print(Text.from_markup(message), soft_wrap=True)

    def table(self, table: Table) -> None:
        with self._lock:
            self._last_print = time.monotonic()
            self.rich.print(table)

    def status(self, message: str | Callable[[], str]) -> None:
        """What is being done now; a function is asked whenever it is shown."""
        self._status = message if callable(message) else lambda: message

    def counter(self, unit: str) -> Callable[[int, int], None]:
        """A progress callback (done, total) that shows a count, a share and the time left."""
        started, first = time.monotonic(), None

        def update(done: int, total: int) -> None:
            nonlocal first
            first = done if first is None else first
            elapsed = time.monotonic() - started
            left = f" · {seconds(elapsed / (done - first) * (total - done))} left" if 0 < first < done < total else ""
            self.status(f"{done:,}/{total:,} {unit}{left}")

        return update

    @contextmanager
    def working(self, name: str) -> Iterator[None]:
        """Show `name` and its status until the block ends."""
        self._name, self._since = name, time.monotonic()
        self.status("")
        stop = threading.Event()
        if self.rich.is_terminal:
            with Live(get_renderable=self._line, console=self.rich, refresh_per_second=5, transient=True):
                yield
            return
        beat = threading.Thread(target=self._beat, args=(stop,), daemon=True)
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()

    def elapsed(self) -> float:
        """Seconds since the work at hand began."""
        return time.monotonic() - self._since

    def _text(self) -> str:
        status = self._status()
        return f"{self._name}  {escape(status)}{' · ' if status else ''}{seconds(self.elapsed())}"

    def _line(self) -> Spinner:
        return Spinner("dots", text=Text.from_markup(self._text(), overflow="ellipsis"))

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(0.5):
            if time.monotonic() - self._last_print > HEARTBEAT_SECONDS:
                self.say(f"  … {self._text()}")


def seconds(value: float) -> str:
    """A duration as people say it: 8 s, 2 min 10 s, 1 h 05 min."""
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
