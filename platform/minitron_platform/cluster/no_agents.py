"""A node of Ray without the two Python programs that Ray runs beside each node."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private import services
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray._raylet import (  # type: ignore[attr-defined]
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
    persist_port,
)

from minitron.replaced import replaced
from minitron_platform.cluster.waiting import waiting

AGENTS = ("--dashboard_agent_command", "--runtime_env_agent_command")  # arguments of Ray's node: how to start them
PORTS = (
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
)


@contextmanager
def no_agents() -> Iterator[None]:
    """Nodes of Ray that this process starts inside the context have no agents. To be kept as long as the nodes run.

    One agent serves metrics, logs and jobs, the other installs runtime environments. A private Ray has no use for them. They
    take half of the CPU time of its start, and a node whose agents have not started after 15 seconds, as happens on a busy
    machine, ends; Ray 2.60 has no setting for either.
    """
    usual = services.start_ray_process
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody else can listen there: Ray would send its token
        port = closed.getsockname()[1]

        def start_ray_process(command: list[str], process_type: str, *arguments: Any, **options: Any) -> Any:
            if process_type == PROCESS_TYPE_RAYLET:
                given = dict(argument.removeprefix("--").split("=", 1) for argument in command if "=" in argument)
                for name in PORTS:  # the node waits until each agent has written where it listens
                    persist_port(given["session_dir"], given["node_id"], name, port)
                command = [_with_idle_agent(argument) for argument in command]
            return usual(command, process_type, *arguments, **options)

        with replaced(services, start_ray_process=start_ray_process):
            yield


def _with_idle_agent(argument: str) -> str:
    """An argument of Ray's node. If it says how to start an agent: with a command instead that waits for the node's end, when
    its input ends, and ignores further arguments."""
    name, _, _ = argument.partition("=")
    return f"{name}={subprocess.list2cmdline(waiting())}" if name in AGENTS else argument
