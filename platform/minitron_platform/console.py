"""Output for the user during a run: a live status line on a terminal, plain lines at regular intervals elsewhere."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.errors import MarkupError
from rich.live import Live
from rich.markup import escape
from rich.measure import measure_renderables
from rich.segment import Segment
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from minitron.errors import MinitronError
from minitron.text import printable

FILE_COLUMNS = 120  # width of tables if the output is not a terminal
HEARTBEAT_SECONDS = 8.0  # longest time without a line if the output is not a terminal
SPEED_SECONDS = 60.0  # whose speed the estimated time left is computed from
LEAST_SECONDS = 1.0  # before which no time left is shown: the counts of one batch come at once
STYLES = ("bold", "dim", "green", "yellow")  # that our messages use; names in them may contain other markup


class _Terminal(RichConsole):
    """Shows control characters in texts as visible characters, and texts in tables as they are, without markup."""

    def __init__(self) -> None:
        super().__init__(highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def _from_markup(message: str, **options: Any) -> Text:
    """A text of our styles alone: no links, and nothing that a name with brackets could break."""
    try:
        text = Text.from_markup(message, emoji=False, **options)
    except MarkupError:
        return Text(message, **options)
    text.spans = [span for span in text.spans if span.style in STYLES]
    return text


def echo(text: str, *, err: bool = False) -> None:
    """Print a line that may contain texts of files, registries or other machines."""
    click.echo(printable(text), err=err)


def print_error(error: MinitronError) -> None:
    """Print an error and its remedy to standard error."""
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(error.problem, err=True)
    if error.remedy:
        click.secho("  fix: ", fg="green", bold=True, nl=False, err=True)
        click.echo(error.remedy, err=True)


class Console:
    """Prints messages, tables and the status of the current work. All methods may be called from any thread.

    command: that the user has typed, for messages; empty in other programs than `minitron`.
    """

    def __init__(self, command: str = "") -> None:
        self.command = command
        self.rich = _Terminal()
        if not self.rich.is_terminal and "COLUMNS" not in os.environ:
            self.rich.width = FILE_COLUMNS
        self._status: Callable[[], str] = str
        self._note: Callable[[], str] | None = None
        self._name = ""
        self._since = time.monotonic()
        self._last_print = time.monotonic()
        self._lock = threading.Lock()

    def say(self, message: str = "") -> None:
        """Print a line with rich markup of the STYLES."""
        with self._lock:
            self._last_print = time.monotonic()
            self.rich.print(_from_markup(message), soft_wrap=True)

    def table(self, table: Table) -> None:
        """Print a table. A text that is wider than its column is folded: cut off, two names could look the same. Columns that
        do not wrap keep their width, also if the table is then wider than the terminal, which wraps it."""
        least = len(table.columns) + 1  # the lines between the columns
        for column in table.columns:
            column.overflow = "fold"
            if column.no_wrap:
                measured = measure_renderables(self.rich, self.rich.options, [column.header, *column.cells])
                column.min_width = measured.maximum
            least += column.min_width or 1
        if least + 2 * len(table.columns) > self.rich.width:
            table.padding = 0
        if least > self.rich.width:
            table.width = least
        with self._lock:
            self._last_print = time.monotonic()
            self.rich.print(table, crop=False)

    def status(self, message: str | Callable[[], str]) -> None:
        """Set the status of the current work. A function is called each time the status is shown."""
        self._status = message if callable(message) else lambda: message

    def note(self, message: Callable[[], str] | None) -> None:
        """Show a text before the status, such as what the work waits for; None removes it."""
        self._note = message

    def counter(self, unit: str) -> Callable[[int, int], None]:
        """A progress callback `(done, total)` that shows the count and the estimated time left as the status."""
        recent: deque[tuple[float, int]] = deque()  # times and counts; what was finished before came at once, long ago

        def update(done: int, total: int) -> None:
            now = time.monotonic()
            if recent and done < recent[-1][1]:  # the work has begun again
                recent.clear()
            recent.append((now, done))
            while len(recent) > 2 and now - recent[1][0] >= SPEED_SECONDS:
                recent.popleft()
            since, first = recent[0]
            known = first < done < total and now - since >= LEAST_SECONDS
            left = f" · {seconds((now - since) / (done - first) * (total - done))} left" if known else ""
            self.status(f"{done:,}/{total:,} {unit}{left}")

        return update

    @contextmanager
    def working(self, name: str) -> Iterator[None]:
        """Show `name`, the status and the elapsed time until the block ends."""
        self._name = name
        self._since = time.monotonic()
        self.status("")
        self.note(None)
        stop = threading.Event()
        if self.rich.is_terminal:
            with Live(get_renderable=self._line, console=self.rich, refresh_per_second=5, transient=True):
                yield
            return
        heartbeat = threading.Thread(target=self._print_heartbeats, args=(stop,), daemon=True)
        heartbeat.start()
        try:
            yield
        finally:
            stop.set()
            heartbeat.join()

    def release(self) -> None:
        """Give the terminal its cursor back, before the process ends in the middle of its work."""
        self.rich.show_cursor(True)

    def elapsed(self) -> float:
        """Seconds since the current `working` block began."""
        return time.monotonic() - self._since

    def _text(self) -> str:
        note = self._note
        status = " · ".join(filter(None, [note() if note else "", self._status()]))
        return f"{self._name}  {escape(status)}{' · ' if status else ''}{seconds(self.elapsed())}"

    def _line(self) -> Spinner:
        return Spinner("dots", text=_from_markup(self._text(), overflow="ellipsis"))

    def _print_heartbeats(self, stop: threading.Event) -> None:
        while not stop.wait(0.5):
            if time.monotonic() - self._last_print > HEARTBEAT_SECONDS:
                try:
                    self.say(f"  … {self._text()}")
                except OSError:  # such as a full disk behind it, which the next line of the work meets too
                    return


def seconds(value: float) -> str:
    """A duration as text: 8 s, 2 min 10 s, 1 h 05 min."""
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
