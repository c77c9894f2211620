"""How many trials a cluster has room for at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

# Of every node's memory, for what starts the workers of a trial that has several: it asks for one byte.
RESERVED_BYTES = 1 << 20


def at_once(nodes: Iterable[Mapping[str, float]], share: Mapping[str, float], workers: int = 1) -> int:
    """How many trials of `workers` workers run at once on nodes with these resources, each worker taking `share`.

    Both map Ray's names ("CPU", "GPU", "memory" in bytes) to amounts. A worker is on one node, a part of a GPU on one GPU.
    """
    return (
        sum(min(_times(name, node.get(name, 0), amount) for name, amount in share.items()) for node in nodes) // workers
    )


def _times(name: str, there: float, amount: float) -> int:
    if name == "memory":
        there -= RESERVED_BYTES
    if name == "GPU" and amount < 1:
        return int(there) * math.floor(1 / amount + 1e-9)
    return max(0, math.floor(there / amount + 1e-9))
