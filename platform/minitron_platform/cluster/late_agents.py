"""Nodes of Ray whose agents start slowly, as on a busy machine or with Python on a disk in the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private.node import Node
from ray._raylet import (  # type: ignore[attr-defined]
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
    persist_port,
)

from minitron_platform.addresses import free_ports

# names of the files, and of Ray's parameters
CHOSEN = (DASHBOARD_AGENT_LISTEN_PORT_NAME, METRICS_AGENT_PORT_NAME, RUNTIME_ENV_AGENT_PORT_NAME)


@contextmanager
def agents_may_be_late() -> Iterator[None]:
    """A node of Ray that this process starts inside the context does not wait for its agents.

    Otherwise it would wait until each has chosen its ports and has written them to files, and would end after 15 seconds, for
    which Ray 2.60 has no setting. Here the ports are chosen before, and the files are there when the node starts.
    """
    start = Node.start_raylet

    def start_raylet(node: Node, *arguments: Any, **options: Any) -> None:
        given = node._ray_params
        first, *others = free_ports(1 + len(CHOSEN))
        given.metrics_export_port = given.metrics_export_port or first
        for name, port in zip(CHOSEN, others, strict=True):
            setattr(given, name, port)
        for name in (METRICS_EXPORT_PORT_NAME, *CHOSEN):
            persist_port(node.get_session_dir_path(), node.node_id, name, getattr(given, name))
        start(node, *arguments, **options)

    Node.start_raylet = start_raylet
    try:
        yield
    finally:
        Node.start_raylet = start
