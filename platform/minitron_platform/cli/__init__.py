"""The command line."""

from minitron_platform.cli.commands import main

__all__ = ["main"]
