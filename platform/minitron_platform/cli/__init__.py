"""The command `minitron`."""

from __future__ import annotations

import signal
import sys
from typing import Any


def main(**options: Any) -> Any:
    """Run the command that was typed. Ctrl-C before it has begun ends in a sentence, as later. options: those of click."""
    try:
        from minitron_platform.cli.commands import main as command
    except KeyboardInterrupt:
        print("\nstopped before anything had begun", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    return command(**options)
