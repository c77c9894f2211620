"""The command `minitron`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def main(**options: Any) -> Any:
    """Run the command that was typed. Ctrl-C before it has begun ends in a sentence, as later, and so does output that cannot
    be written. options: those of click."""
    _open_missing_streams()
    try:
        from minitron_platform.cli.commands import main as command
    except KeyboardInterrupt:
        print("\nstopped before anything had begun", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    from minitron_platform.cli.output import unwritable
    from minitron_platform.console import print_error

    try:
        return command(**options)
    except OSError:
        refused = unwritable("\n")  # an unbuffered stream has nothing waiting
        if refused is None:
            raise
        print_error(refused)
        raise SystemExit(2) from None
    finally:
        unwritable()


def _open_missing_streams() -> None:
    """Open input, output and errors that were closed (`2>&-`) on nothing. The next file that is opened would have the number of
    one, so that what a library or another program prints would be written into a database or a checkpoint."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
