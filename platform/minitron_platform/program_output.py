"""What other programs, such as nvidia-smi, say of this machine."""

from __future__ import annotations

import subprocess


def program_output(*command: str, seconds: float) -> str:
    """What a program prints; empty if it does not exist, fails, or takes longer than `seconds`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
