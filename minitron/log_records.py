"""Log records of all libraries, without secrets and control characters, whichever handler prints them."""

from __future__ import annotations

import logging
from typing import Any

from minitron.redaction import redact
from minitron.text import printable


def safe(text: str) -> str:
    """`text` as a terminal and a log may show it."""
    return printable(redact(text))


class SafeRecord(logging.LogRecord):
    """A record whose message and traceback can be shown. Libraries such as mlflow and ray have handlers of their own."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.exc_info and self.exc_info[0] is not None:
            self.exc_text = safe(logging.Formatter().formatException(self.exc_info))  # which every formatter then uses

    def getMessage(self) -> str:
        return safe(super().getMessage())


def make_records_safe() -> None:
    """Make all further log records of this process safe."""
    logging.setLogRecordFactory(SafeRecord)
