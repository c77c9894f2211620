"""The command that the user typed."""

from __future__ import annotations

import os
import shlex
import shutil
import sys

from minitron.storage import redact


def command_line() -> str:
    """The command that the user typed, or typed to submit this job, without secrets in addresses."""
    if resume := os.environ.get("MINITRON_RESUME"):
        return resume
    return shlex.join([*shlex.split(program()), *map(redact, sys.argv[1:])])


def program() -> str:
    """The command that starts this program in the user's shell, which is the submitter's in a job."""
    if resume := os.environ.get("MINITRON_RESUME"):
        return resume.partition(" submit ")[0]
    if shutil.which("minitron"):
        return "minitron"
    if sys.argv[0].endswith("__main__.py"):
        return shlex.join([sys.executable, "-m", "minitron_platform"])
    return shlex.quote(sys.argv[0])
