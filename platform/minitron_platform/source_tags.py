"""MLflow's tags for who runs which code."""

from __future__ import annotations

import getpass
import os

from minitron_platform.cluster.packaging import package_folder
from minitron_platform.program_output import program_output


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
    return program_output("git", "-C", str(folder), "rev-parse", "HEAD", seconds=10).strip()
