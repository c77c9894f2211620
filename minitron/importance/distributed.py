"""Calibration with several processes: each reads its share of the rows, and the sums are all-reduced.

Without an initialised torch.distributed group there is one process and no communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

Items = TypeVar("Items", Tensor, range)


def own_share(items: Items) -> Items:
    """Every world-size-th item, starting at this process's rank; may be empty."""
    if not _is_distributed():
        return items
    return items[dist.get_rank() :: dist.get_world_size()]


def own_batches(rows: Tensor, batch_rows: int) -> Iterator[Tensor]:
    """This process's share of `rows`, `batch_rows` at a time; may be empty."""
    own = own_share(rows)
    for start in range(0, len(own), batch_rows):
        yield own[start : start + batch_rows]


def sum_over_processes(values: Tensor) -> Tensor:
    """All-reduce `values` in place; the result is bit-identical in every process. All processes must call it."""
    if _is_distributed():
        dist.all_reduce(values)
    return values


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
