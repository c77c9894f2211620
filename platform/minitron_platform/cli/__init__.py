"""The command `minitron`."""

from minitron_platform.cli.commands import main

__all__ = ["main"]
