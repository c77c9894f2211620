"""A copy of the packages from which jobs are submitted, and what the tests of jobs share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minitron_platform.cluster.packaging import package_folder

RECIPE = "teacher: tiny\nname: café\n"
TOKEN = "0123456789abcdef" * 4
PLACES = {"minitron": ".", "minitron_search": "search", "minitron_platform": "platform"}


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s still not: {what}"
        time.sleep(0.2)


def python_path(*folders: Path) -> str:
    return os.pathsep.join(map(str, folders))


@dataclass
class Checkout:
    """A copy of the packages, laid out as in the repository, and a client that submits from it."""

    root: Path

    def submit(self, address: str, name: str, entrypoint: str, resume: str = "") -> tuple[str, str]:
        """Submit `entrypoint` as a job; returns the submission id and the standard error."""
        client = "import sys; from minitron_platform.cluster.job_start import submit_text as submit; "
        client += (
            f"name, address, entrypoint, resume = sys.argv[1:]; print(submit({RECIPE!r}, name=name, address=address, "
        )
        client += "entrypoint=entrypoint, resume=resume))"
        paths = [self.root, self.root / "search", self.root / "platform"]
        sent = subprocess.run(
            [sys.executable, "-c", client, name, address, entrypoint, resume],
            # RAY_ADDRESS would send Ray's own client to another cluster
            env={**os.environ, "PYTHONPATH": python_path(*paths), "RAY_ADDRESS": "http://127.0.0.1:1"},
            cwd=self.root,
            capture_output=True,
            text=True,
        )
        assert sent.returncode == 0, sent.stderr
        return sent.stdout.strip(), sent.stderr


def copy_packages(folder: Path) -> Checkout:
    """A checkout in `folder`."""
    for package, place in PLACES.items():
        shutil.copytree(package_folder(package), folder / place / package)
    return Checkout(folder)
