"""A cluster of Ray on this machine: a head without CPUs and nodes with one CPU each, all with a home folder of their own."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.kills.storage import wait_for

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 240  # longest wait for a head or a node to start, on a machine that others use too
STARTS = 4  # of a node; Ray ends one that takes 30 s
TOKEN = secrets.token_hex(32)
WORK = ("ray::RayTrainWorker", "ray::ImplicitFunc", "ray::call")  # how Ray names them


@dataclass
class Node:
    """A head or a node with one CPU."""

    name: str
    home: Path
    process: subprocess.Popen[bytes] = field(repr=False)

    def processes(self) -> list[psutil.Process]:
        """All processes of the node but the first, which started them."""
        return descendants(self.process)

    def workers(self) -> list[psutil.Process]:
        """Processes that compute for a stage."""
        return [process for process in self.processes() if _title(process).startswith(WORK)]

    def kill(self) -> None:
        """End all of its processes at once, as when the machine is lost."""
        kill(self.process, *lives_in(self.home))


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that a process has started, and those that they have."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def sends_from(process: psutil.Process, port: int) -> bool:
    """Whether a process has a connection from a port of this machine."""
    with suppress(psutil.Error):
        return any(each.laddr.port == port for each in process.net_connections("tcp"))
    return False


def lives_in(home: Path) -> list[psutil.Process]:
    """The processes with this home folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("HOME") == str(home):
                found.append(process)
    return found


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class Machines:
    """The cluster. variables: environment of its processes."""

    def __init__(self, folder: Path, variables: Mapping[str, str]) -> None:
        self.folder = folder
        self.variables = dict(variables)
        self.count = 0
        self.head: Node | None = None
        self.nodes: list[Node] = []
        self.short = tempfile.TemporaryDirectory(prefix="mk-", dir="/tmp", ignore_cleanup_errors=True)

    def start(self) -> None:
        """A new head and two nodes."""
        self.port = _free_port()
        self.head = self._start(
            "--head", "--port", str(self.port), "--num-cpus", "0", "--include-dashboard", "false",
            "--system-config", '{"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000}',
        )  # fmt: skip
        wait_for(self.node_ids, "the head answers", START_SECONDS)
        self.nodes = []
        for _ in range(2):
            self.add_node()

    def add_node(self) -> Node:
        """Start a node; returns when the head knows it."""
        for _ in range(STARTS):
            node = self._start("--address", self.address, "--num-cpus", "1")
            started = node.process
            while node.name not in self.node_ids() and started.poll() is None:
                time.sleep(0.5)
            if started.poll() is None:
                self.nodes.append(node)
                return node
            node.kill()
        raise RuntimeError(f"no node has started: see {self.folder}/{node.name}.log")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def gcs(self) -> Any:
        """A client of the head's directory."""
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)  # before Ray is imported
        from ray._raylet import GcsClient

        return GcsClient(address=self.address)

    def node_ids(self) -> dict[str, str]:
        """ID of each node that the head believes to be alive, by name; its own too. Empty if it does not answer."""
        try:
            infos = self.gcs().get_all_node_info(timeout=5).values()
        except Exception as error:  # Ray's own kinds for a head that is still starting
            if "ray" not in type(error).__module__:
                raise
            return {}
        return {info.node_name: info.node_id.hex() for info in infos if info.state == 0}

    def kill_node(self, node: Node) -> None:
        """Lose a node; returns when the head knows."""
        node.kill()
        self.nodes.remove(node)
        wait_for(lambda: node.name not in (self.node_ids() or node.name), "the head knows that the node is lost", 120)

    def kill_all(self) -> None:
        """End every process of the cluster."""
        for node in [*self.nodes, *([self.head] if self.head else [])]:
            node.kill()
        self.nodes, self.head = [], None

    def close(self) -> None:
        self.kill_all()
        self.short.cleanup()

    def environment(self, name: str) -> dict[str, str]:
        """Environment of the processes of a node or driver, which have a home of their own."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MINITRON_"))}
        return {
            **kept,
            **self.variables,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        }

    def _start(self, *options: str) -> Node:
        name = f"node-{self.count}"
        self.count += 1
        environment = self.environment(name)
        command = [
            "ray", "start", "--block", "--node-ip-address", "127.0.0.1", "--node-name", name,
            "--temp-dir", f"{self.short.name}/{self.count}", "--object-store-memory", "100000000", *options,
        ]  # fmt: skip
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return Node(name, self.folder / name, process)


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def drain(machines: Machines, node: Node) -> None:
    """Announce that a node will be taken away in a minute, as a cloud does."""
    from ray.core.generated import autoscaler_pb2

    deadline = int((time.time() + 60) * 1000)
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, why = machines.gcs().drain_node(machines.node_ids()[node.name], reason, "spot", deadline)
    assert accepted, why


def kill(process: subprocess.Popen[bytes], *more: psutil.Process) -> None:
    """kill -9 of a process, all that descend from it, and `more`; returns when they have ended."""
    others = [*descendants(process), *more]
    for each in (process, *others):
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(others, timeout=30)


def kill_alone(process: psutil.Process) -> None:
    """kill -9 of one process; returns when it has ended."""
    process.kill()
    process.wait(30)
