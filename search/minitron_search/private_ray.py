"""A private Ray: a single node that starts and ends with its driver, and whose workers have the driver's environment."""

from __future__ import annotations

import os

_MARK = "MINITRON_PRIVATE_RAY"  # an environment variable of its driver and workers


def is_private() -> bool:
    """Whether this process belongs to a private Ray."""
    return _MARK in os.environ


def private_settings() -> dict[str, str]:
    """Environment variables for its driver and workers, except those that the user has set."""
    settings = {
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody preempts its node
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # upper limit of the delay at the end of a training
        "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # as Ray Train sets it for its controller
    }
    return {_MARK: "1", **{name: value for name, value in settings.items() if name not in os.environ}}
