"""The nodes of a Ray cluster, seen without joining it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from ray._private.internal_api import get_state_from_address
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError

from minitron.device import datasheet
from minitron.errors import MinitronError
from minitron.loopback import is_loopback
from minitron_platform.addresses import answers
from minitron_platform.cluster.head_check import check_head
from minitron_search.nodes import Node, possible_nodes, present_nodes

ANSWER_SECONDS = 3.0
JOIN_SECONDS = 5.0


@dataclass(frozen=True)
class ClusterNodes:
    """The nodes of a cluster."""

    present: Sequence[Node]
    """Those that run."""
    possible: Sequence[Node]
    """The same, and those that its autoscaler may start."""

    @property
    def gpu(self) -> str:
        """The model of its GPUs as Ray names it, such as "H100"; of several, the one with the least memory. Empty if one of
        them is not in `minitron.device.DATASHEETS`, or none is named."""
        kinds = {
            name.partition(":")[2] for node in self.possible for name in node if name.startswith("accelerator_type:")
        }
        memory = {kind: sheet.memory for kind in kinds if (sheet := datasheet(kind))}
        return min(memory, key=memory.__getitem__) if memory and len(memory) == len(kinds) else ""

    @property
    def gpus_per_node(self) -> int:
        """GPUs of its largest node."""
        return max((int(node.get("GPU", 0)) for node in self.possible), default=0)


def listens_at_loopback_alone(address: str) -> bool:
    """Whether `address` (HOST:PORT) is of this machine's loopback interface, and the head does not answer at the machine's own
    address, which Ray would take instead. The head of clusters/local is such a one."""
    host, _, port = address.rpartition(":")
    if not (port.isdecimal() and is_loopback(host.strip("[]"))):
        return False
    return not answers(canonicalize_bootstrap_address(address) or "", ANSWER_SECONDS)


def check_answers(address: str) -> None:
    """Raise MinitronError if nothing listens at HOST:PORT or ray://HOST:PORT; ray.init would retry for more than a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=JOIN_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise MinitronError(
                f"Ray at {address!r} does not answer ({getattr(error, 'strerror', None) or error})",
                "check the address with `ray status` on the cluster, or leave it out for a private Ray on this machine",
            ) from error


def nodes_at(address: str | None) -> ClusterNodes | None:
    """The nodes of the cluster at `address`, or at RAY_ADDRESS; None if nothing listens there, or the address is of Ray's
    client (ray://). Raises what `check_head` raises."""
    address = address or os.environ.get("RAY_ADDRESS") or ""
    if listens_at_loopback_alone(address):
        head: str | None = address
    else:
        head = None if address.startswith("ray://") else canonicalize_bootstrap_address(address)
    if not head or not answers(head, ANSWER_SECONDS):
        return None
    check_head(head, address)
    try:
        state = get_state_from_address(head)
        return ClusterNodes(present_nodes(state), possible_nodes(state))
    except (RayError, RuntimeError, ValueError):  # another version of Ray; joining it says which
        return None
