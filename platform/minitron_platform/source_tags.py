"""MLflow's tags for who runs which code."""

from __future__ import annotations

import getpass
import os
import subprocess

from minitron_platform.cluster.packaging import package_folder


def source_tags(command: str) -> dict[str, str]:
    """User, command and commit; the commit only in a checkout. command: such as "minitron run"."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user without a name, as in some containers
        user = str(os.getuid())
    tags = {"mlflow.user": user, "mlflow.source.name": command, "mlflow.source.type": "LOCAL"}
    commit = _commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def _commit() -> str:
    """The commit of the checkout that the code is in; empty without one, or without git."""
    folder = package_folder("minitron")
    if not (folder.parent / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
