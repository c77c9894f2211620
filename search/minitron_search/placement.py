"""How many trials fit on a cluster at the same time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

# Of every node's memory, for the process that starts the workers of a trial that has several: it takes one byte.
RESERVED_BYTES = 1 << 20


def max_concurrent_trials(nodes: Iterable[Mapping[str, float]], share: Mapping[str, float], workers: int = 1) -> int:
    """Number of trials of `workers` workers that run at once on nodes with these resources, each worker taking `share`.

    Both map Ray's names ("CPU", "GPU", "memory" in bytes) to amounts. A worker is on one node, a part of a GPU on one GPU.
    """
    fitting = sum(min(_times(name, node.get(name, 0), amount) for name, amount in share.items()) for node in nodes)
    return fitting // workers


def _times(name: str, available: float, amount: float) -> int:
    if name == "memory":
        available -= RESERVED_BYTES
    if name == "GPU" and amount < 1:
        return int(available) * math.floor(1 / amount + 1e-9)
    return max(0, math.floor(available / amount + 1e-9))
