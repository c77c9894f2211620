"""Errors that a user can fix.

Each raises `MinitronError` with one sentence that names the file or key and its value, and one that says what to do. The
command line prints both and exits with 2; any other exception is a bug and keeps its stack trace.
"""

from __future__ import annotations

from collections.abc import Sequence

from minitron.redaction import redact
from minitron.text import printable


class MinitronError(Exception):
    """A problem in the user's input: `problem` names the file or key and the value, `remedy` says what to do. Both can be shown
    on a terminal, whatever the file contained, and addresses in them are without secrets."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = printable(redact(problem))
        self.remedy = printable(redact(remedy))
        super().__init__(self.problem)

    def __str__(self) -> str:
        return f"{self.problem}\n  remedy: {self.remedy}" if self.remedy else self.problem

    def __reduce__(self) -> tuple[type[MinitronError], tuple[str, str]]:
        # Ray pickles errors to send them between processes; both parts must survive.
        return type(self), (self.problem, self.remedy)


def one_line(error: BaseException, longest: int = 400) -> str:
    """An error as one line for a table: problem and remedy, or type and message; each cut to `longest` characters."""
    if isinstance(error, MinitronError):
        parts = [error.problem, error.remedy]
    else:
        parts = [f"{type(error).__name__}: {error}" if str(error) else type(error).__name__]
    return "; ".join(" ".join(printable(redact(part)).split())[:longest] for part in parts if part)


class InputError(MinitronError):
    """An argument, file, model or dataset that cannot be used as given."""


def together(errors: Sequence[InputError]) -> InputError:
    """One error of one or several: of several a line for each, with its remedy."""
    if len(errors) == 1:
        return errors[0]
    lines = [f"{error.problem} ({error.remedy})" if error.remedy else error.problem for error in errors]
    listed = "".join(f"\n  - {' '.join(line.split())}" for line in lines)
    return InputError(f"{len(errors)} problems:{listed}", "correct them, as the lines say")


class StorageError(MinitronError):
    """A path that cannot be read, written or trusted: missing, no permission, disk full, wrong checksum."""


class NotWritableError(StorageError):
    """A disk that is full, or a folder that this user may not write to: another location helps."""


class MissingFileError(StorageError):
    """A file that does not exist."""


class TakenOverError(MinitronError):
    """Another process has taken the work over. The one that gets this error must not write anything more."""


class NonFiniteError(MinitronError):
    """A loss or gradient became NaN or infinite."""
