"""How many trials fit on a cluster at the same time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

# Memory of every node that is kept for the processes that start the workers of a trial: each requests one byte.
RESERVED_BYTES = 1 << 20


def max_concurrent_trials(
    nodes: Iterable[Mapping[str, float]], share: Mapping[str, float], workers: int = 1, least: int | None = None
) -> int:
    """Number of trials that run at the same time on `nodes`, if each has `workers` workers and each worker requests `share`.

    `nodes` and `share` map Ray's resource names ("CPU", "GPU", "memory" in bytes) to amounts. A worker runs on one node, and a
    fraction of a GPU is of one GPU. least: the smallest number of workers of a trial, by default `workers`; at most one of the
    trials has fewer than `workers`.
    """
    max_workers = sum(min(_fits(name, node.get(name, 0), amount) for name, amount in share.items()) for node in nodes)
    whole, rest = divmod(max_workers, workers)
    return whole + (rest >= (least or workers))


def _fits(name: str, available: float, amount: float) -> int:
    """How many times `amount` of a resource fits into what a node has of it."""
    if name == "memory":
        available -= RESERVED_BYTES
    if name == "GPU" and amount < 1:
        return int(available) * math.floor(1 / amount + 1e-9)
    return max(0, math.floor(available / amount + 1e-9))
