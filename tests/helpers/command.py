"""The command `minitron`, in a process of its own or in this one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]


def environment():
    """The environment without settings of Minitron, MLflow and Ray."""
    paths = [str(ROOT / part) for part in (".", "platform", "search")]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MINITRON_", "MLFLOW_TRACKING", "RAY_ADDRESS"))}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}


def command(*arguments):
    return [sys.executable, "-m", "minitron_platform", *map(str, arguments)]


def run_minitron(*arguments, cwd, timeout=500):
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def minitron_here(*arguments, cwd, typed=None):
    """Like `run_minitron` but in this process, which saves the seconds of the imports: for tests of the output. typed: the
    lines of its input."""
    from minitron_platform.cli.commands import main
    from minitron_search import private_ray

    mark = {name: os.environ[name] for name in (private_ray._MARK,) if name in os.environ}  # of the Ray that it uses
    with contextlib.chdir(cwd), mock.patch.dict(os.environ, environment() | mark, clear=True):
        done = CliRunner().invoke(main, [str(argument) for argument in arguments], input=typed)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return SimpleNamespace(returncode=done.exit_code, stdout=done.stdout, stderr=done.stderr)
