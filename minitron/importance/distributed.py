"""Calibration by several processes: each reads its share of the rows, and their sums are added up.

Without an initialised torch.distributed group there is one process, and nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

Items = TypeVar("Items", Tensor, range)


def own_share(items: Items) -> Items:
    """Every world-size-th item, from this process's rank on; may be empty."""
    if not _several():
        return items
    return items[dist.get_rank() :: dist.get_world_size()]


def own_batches(rows: Tensor, batch_rows: int) -> Iterator[Tensor]:
    """This process's share of `rows`, `batch_rows` at a time; nothing where it has none."""
    own = own_share(rows)
    for start in range(0, len(own), batch_rows):
        yield own[start : start + batch_rows]


def add_up(values: Tensor) -> Tensor:
    """The sum of every process's `values`, in place, the same bits on each. All processes must call it."""
    if _several():
        dist.all_reduce(values)
    return values


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
