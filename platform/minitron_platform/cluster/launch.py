"""Ray on the nodes that a scheduler has given to a job, for the duration of one command.

The same command is started once on every node, with the node's rank. That of rank 0 starts a head without CPUs and GPUs and a
worker, waits for the other nodes, and runs the user's command; the others start a worker, which ends after the head. Each stops
exactly the processes that it has started. (`ray symmetric-run` ends with `ray stop`, which stops every Ray on a node, and
exits with 0 if Ray did not start.)
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from ray._raylet import Config, GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import RpcError

from minitron.environment import environment_variables
from minitron.errors import InputError, MinitronError
from minitron_platform.addresses import answers, free_ports
from minitron_platform.cluster.ray_node import RayNode, end, ray_node, start
from minitron_platform.cluster.ray_session import QUIET
from minitron_platform.cluster.tokens import auth_token

INTERRUPTED = 75  # exit code after a notice; EX_TEMPFAIL of sysexits.h: try again
ENDED = 128 + signal.SIGTERM  # exit code after SIGTERM or SIGINT
POLL = 0.5  # seconds
HEAD_SECONDS = 2.0  # time for the head to answer
HEAD_GONE = 5.0  # seconds without an answer, after which a worker believes that the head has ended


@dataclass(frozen=True)
class JobNode:
    """One node of the job."""

    rank: int
    """Number of this node; the head is on node 0."""
    nodes: int
    head: str
    """Host name or address of the node of rank 0."""
    port: int
    """Port of the head; free on its node."""
    cpus: int | None = None
    """CPUs that Ray may use on this node; None for all that it detects."""
    gpus: int | None = None
    """GPUs that Ray may use on this node; None for all that it detects."""

    @property
    def address(self) -> str:
        """Address of the cluster, HOST:PORT."""
        return f"{self.head}:{self.port}"


class _Signals:
    """The signals that this process has received."""

    def __init__(self) -> None:
        self.noticed = False
        """SIGUSR1: the nodes will be taken away."""
        self.ended = False
        """SIGTERM or SIGINT: end now."""
        signal.signal(signal.SIGUSR1, self._notice)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.noticed = True

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.ended = True

    @property
    def any(self) -> bool:
        return self.noticed or self.ended


def launch(command: Sequence[str], node: JobNode, *, notice: float, timeout: float, say: Callable[[str], None]) -> int:
    """Run `command` on the node of rank 0, with a Ray of all nodes at RAY_ADDRESS, and return its exit code; 0 on other nodes.

    notice: seconds between SIGUSR1 at rank 0, which says that the nodes will be taken away, and the end. In this time trainings
    save a checkpoint; then the command gets SIGTERM, and 75 is returned. SIGTERM and SIGINT end everything at once, with 143.
    timeout: seconds in which all nodes must have joined.
    say: receives messages, one line at a time.
    Raises InputError without a token in the environment, MinitronError if Ray does not start or nodes are missing.
    """
    if auth_token() is None:
        raise InputError(
            "no token is set for Ray, and everybody who reaches the nodes could run code on them",
            "set RAY_AUTH_TOKEN to the same secret on all nodes (openssl rand -hex 32), or RAY_AUTH_TOKEN_PATH to its file",
        )
    _check_head(node)
    if node.rank == 0 and shutil.which(command[0]) is None:  # it is started when all nodes have joined
        raise InputError(f"{command[0]}: there is no such program", "activate the environment that has it")
    signals = _Signals()
    deadline = time.monotonic() + timeout
    with environment_variables({**QUIET, "RAY_AUTH_MODE": "token"}):
        Config.initialize("")  # Ray has read RAY_AUTH_MODE when it was imported
        if node.rank > 0:
            return _follow(node, signals, deadline, say)
        with ray_node("head", _head_arguments(node), say) as head:
            _await(_HeadJoined(node), signals, deadline, [head])
            with ray_node("worker", _worker_arguments(node), say) as worker:
                _await(_Joined(node, say), signals, deadline, [head, worker])
                return _run(command, node, signals, notice, head)


def _follow(node: JobNode, signals: _Signals, deadline: float, say: Callable[[str], None]) -> int:
    """Be a worker until the head has ended."""
    _await(_HeadJoined(node), signals, deadline, [])
    with ray_node("worker", _worker_arguments(node), say) as worker:
        answered = time.monotonic()
        while not signals.any and time.monotonic() < answered + HEAD_GONE:
            time.sleep(POLL)
            if answers(f"{node.head}:{node.port}", HEAD_SECONDS):
                worker.check()
                answered = time.monotonic()
    return 0


def _run(command: Sequence[str], node: JobNode, signals: _Signals, notice: float, head: RayNode) -> int:
    """The exit code of the command, or that of the signal that has ended it."""
    if signals.any:
        return ENDED if signals.ended else INTERRUPTED
    with environment_variables({"RAY_ADDRESS": node.address}):
        process = start(command)
    last = math.inf  # time.monotonic() at which the command is ended
    while process.poll() is None:
        if signals.noticed and last == math.inf:
            _announce_end(node, notice)
            last = time.monotonic() + notice
        if signals.ended or head.has_ended or time.monotonic() > last or (last < math.inf and not _living(node)):
            end(process, signal.SIGTERM)
            head.check()
            return ENDED if signals.ended else INTERRUPTED
        time.sleep(POLL)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _living(node: JobNode, *, head: bool = False) -> list[str]:
    """Ids of the living worker nodes, or of the head. Raises ray.exceptions.RpcError if the head does not answer."""
    infos = GcsClient(address=node.address).get_all_node_info(timeout=10)
    return [
        node_id.hex()
        for node_id, info in infos.items()
        if info.state == GcsNodeInfo.ALIVE and info.is_head_node == head
    ]


def _announce_end(node: JobNode, notice: float) -> None:
    """Tell Ray that all worker nodes will be taken away in `notice` seconds; each ends earlier if it has no work."""
    client = GcsClient(address=node.address)
    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    for other in _living(node):
        client.drain_node(
            other, reason, "the scheduler takes the nodes away", int((time.time() + notice) * 1000), timeout=10
        )


def _head_arguments(node: JobNode) -> list[str]:
    host = socket.gethostbyname(node.head)
    # some systems give a machine's own name an address of the loopback interface, which others could not reach
    own = [] if host.startswith("127.") else ["--node-ip-address", host]
    ports = ["--port", str(node.port), "--ray-client-server-port", str(*free_ports(1))]
    return ["--head", "--num-cpus", "0", "--num-gpus", "0", "--dashboard-host", "127.0.0.1", *ports, *_agent(), *own]


def _worker_arguments(node: JobNode) -> list[str]:
    arguments = ["--address", node.address, *_agent()]
    for option, value in (("--num-cpus", node.cpus), ("--num-gpus", node.gpus)):
        if value is not None:
            arguments += [option, str(value)]
    return arguments


def _check_head(node: JobNode) -> None:
    """Raise InputError for a head whose name is not known, or, on its node, whose port is in use."""
    try:
        if not node.head:
            raise OSError("no name")
        socket.gethostbyname(node.head)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--head {node.head}: {error}", "give a name or address that all nodes know") from error
    if node.rank > 0:
        return
    try:
        socket.create_server(("", node.port)).close()
    except OSError as error:
        problem = f"--port {node.port}: {os.strerror(error.errno or 0)}"
        raise InputError(problem, "give another port, the same on all nodes of the job") from error


def _agent() -> list[str]:
    # Ray's default is one port for all nodes of a machine
    return ["--dashboard-agent-listen-port", str(*free_ports(1))]


class _HeadJoined:
    """Whether the head has joined its cluster, which it does seconds after it listens; until then others are refused."""

    def __init__(self, node: JobNode) -> None:
        self.node = node

    def __call__(self) -> bool:
        try:
            return answers(f"{self.node.head}:{self.node.port}", HEAD_SECONDS) and bool(_living(self.node, head=True))
        except RpcError:  # it has not started completely, or is busy
            return False

    def __str__(self) -> str:
        return f"no head answers at {self.node.address}"


class _Joined:
    """Whether all nodes have joined the head."""

    def __init__(self, node: JobNode, say: Callable[[str], None]) -> None:
        self.node = node
        self.say = say
        self.count = 0

    def __call__(self) -> bool:
        try:
            count = len(_living(self.node))
        except RpcError:  # the head is busy
            return False
        if count != self.count:
            self.count = count
            self.say(str(self))
        return count >= self.node.nodes

    def __str__(self) -> str:
        return f"{self.count} of {self.node.nodes} nodes have joined Ray at {self.node.address}"


def _await(condition: _HeadJoined | _Joined, signals: _Signals, deadline: float, started: Sequence[RayNode]) -> None:
    """Wait for the condition, or for a signal. Raises MinitronError at the deadline, or if a started node ends."""
    while not signals.any and not condition():
        for process in started:
            process.check()
        if time.monotonic() > deadline:
            raise MinitronError(
                f"{condition}, and the time for it is over", "see the other nodes' output, or give --timeout"
            )
        time.sleep(POLL)
