"""Whether a node is about to be taken away, as clouds announce it to Ray some time before."""

from __future__ import annotations

import time

import ray

LOOK_SECONDS = 2.0  # between two looks at the announcements


def group_is_leaving() -> bool:
    """Whether Ray Train has told this process, one of its workers, that a node of the group is about to be taken away. Its own
    function waits until all processes ask for it."""
    from ray.train.v2._internal.execution.context import (
        get_train_context,  # here: a trial of one process needs no Ray Train
    )

    return get_train_context().preemption_context.preemption_info is not None


class NodeIsLeaving:
    """Called in a process of Ray outside Ray Train: whether its node is about to be taken away. False without Ray."""

    def __init__(self) -> None:
        self._node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else None
        self._last_look = -LOOK_SECONDS
        self._leaving = False

    def __call__(self) -> bool:
        now = time.monotonic()
        if self._node and not self._leaving and now - self._last_look >= LOOK_SECONDS:
            self._last_look = now
            self._leaving = self._node in ray._private.state.state.get_draining_nodes()
        return self._leaving
