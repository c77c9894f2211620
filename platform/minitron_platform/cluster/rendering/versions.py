"""The versions that a cluster's files name, each from one source."""

from __future__ import annotations

import sys
from importlib.metadata import version


def ray_version() -> str:
    """Of the Ray that is installed here: client, head and workers need the same."""
    return version("ray")


def python_version() -> str:
    """Of this Python, such as "3.11": Ray needs the same on all nodes."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"
