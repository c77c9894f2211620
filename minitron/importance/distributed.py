"""Calibration with several processes: each reads its share of the rows, and the sums are all-reduced.

Without an initialised torch.distributed group there is one process and no communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from minitron.processes import is_sharded, own_rank, world_size

Items = TypeVar("Items", Tensor, range)


def own_share(items: Items, of_rank: int | None = None) -> Items:
    """Every world-size-th item, starting at this process's rank, or at `of_rank`; may be empty. Rank 0 has the most."""
    return items[own_rank() if of_rank is None else of_rank :: world_size()]


def own_batches(rows: Tensor, batch_rows: int, model: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """This process's share of `rows`, `batch_rows` at a time, and whether the batch counts; may be empty.

    For a sharded model there are equally many in all processes: batches that do not count make up for the missing ones.
    """
    own = own_share(rows)
    for start in range(0, len(own), batch_rows):
        yield own[start : start + batch_rows], True
    if is_sharded(model):
        most = -(-len(own_share(rows, of_rank=0)) // batch_rows)
        for _ in range(-(-len(own) // batch_rows), most):
            yield rows[:batch_rows], False


def sum_over_processes(values: Tensor) -> Tensor:
    """All-reduce `values` in place; the result is bit-identical in every process. All processes must call it."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values
