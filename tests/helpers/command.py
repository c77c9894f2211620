"""`minitron` as a user types it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment():
    """That of a shell that has set nothing for Minitron, MLflow or Ray."""
    paths = [str(ROOT / part) for part in (".", "platform", "search")]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MINITRON_", "MLFLOW_TRACKING", "RAY_ADDRESS"))}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}


def command(*arguments):
    return [sys.executable, "-m", "minitron_platform", *map(str, arguments)]


def run_minitron(*arguments, cwd, timeout=500):
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout
    )
