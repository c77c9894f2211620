"""A private Ray: one node, that begins and ends with its driver, and whose workers have the driver's environment."""

from __future__ import annotations

import os

_MARK = "MINITRON_PRIVATE_RAY"  # in the environment of its driver and workers


def is_private() -> bool:
    """Whether the Ray of this process is a private one."""
    return _MARK in os.environ


def private_settings() -> dict[str, str]:
    """Environment of its driver and workers; what the user has set stays."""
    settings = {
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # its node is taken away by nobody
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how late the end of a training is heard of, at most
    }
    return {_MARK: "1", **{name: value for name, value in settings.items() if name not in os.environ}}
