"""Work that the processes of torch.distributed share: batches are dealt out whole, and results are exchanged as tensors.

Without an initialised process group, or for work that is not shared (`together` false), there is one process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitron.collectives import exchange_device
from minitron.errors import MinitronError
from minitron.sharded_tensors import is_dtensor

Item = TypeVar("Item")


def world_size(together: bool = True) -> int:
    """Number of processes that share the work."""
    return dist.get_world_size() if together and dist.is_available() and dist.is_initialized() else 1


def own_rank(together: bool = True) -> int:
    """This process's number among those that share the work."""
    return dist.get_rank() if world_size(together) > 1 else 0


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of the model's weights, so that they must make equally many forward passes."""
    return any(is_dtensor(parameter) for parameter in model.parameters())


def dealt(batches: Sequence[Item], model: nn.Module, *, together: bool) -> Iterator[tuple[Item, bool]]:
    """This process's batches, and whether their results count.

    The layers of a sharded model are gathered by all processes together: one that has no batch of its own in the last round
    then repeats one, whose results do not count.
    """
    world = world_size(together)
    end = world * -(-len(batches) // world) if is_sharded(model) else len(batches)
    for number in range(own_rank(together), end, world):
        yield batches[number % len(batches)], number < len(batches)


@contextmanager
def all_succeed(together: bool) -> Iterator[None]:
    """Work of one process, which all of them end alike: an error is raised in the processes without one too.

    The group of processes does not survive an error of memory, which is raised at once.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        largest([1], together)
        raise
    if largest([0], together) != [0]:
        raise MinitronError("the measurement failed in another process", "its log says why")


@contextmanager
def in_turn(together: bool) -> Iterator[None]:
    """The block, which one process of each node runs after another. All processes enter it, and all of them leave it together,
    those in which it raises too."""
    number = int(os.environ.get("LOCAL_RANK", own_rank(together)))
    (last,) = largest([number], together)
    for _ in range(number):
        largest([0], together)
    try:
        yield
    finally:
        for _ in range(number, last + 1):
            largest([0], together)


def largest(numbers: Sequence[int], together: bool = True) -> list[int]:
    """The maximum of each number over the processes."""
    if world_size(together) == 1:
        return list(numbers)
    values = torch.tensor(list(numbers), dtype=torch.int64, device=exchange_device())
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def wait_for_all() -> None:
    """Wait until all processes have called this.

    By a tensor on the GPU of each. `torch.distributed.barrier`, if it comes before any tensor, guesses the GPU from the rank:
    another process's where nodes have different numbers of processes.
    """
    largest([0])


def total(number: int, together: bool = True) -> int:
    """The sum of the processes' numbers."""
    if world_size(together) == 1:
        return number
    numbers = torch.tensor(number, device=exchange_device())
    dist.all_reduce(numbers)
    return int(numbers)


def check_same(what: str, content: Iterable[bytes], together: bool) -> None:
    """Raise MinitronError in every process unless all have the same content."""
    if world_size(together) == 1:
        return
    digest = hashlib.sha256()
    for part in content:
        digest.update(part)
    number = int.from_bytes(digest.digest()[:7], "big")
    high, low = largest([number, -number])
    if high != -low:
        raise MinitronError(f"{what} differ between the processes", "give all processes the same files and settings")


def all_rows(own: Tensor, together: bool) -> Tensor:
    """The rows [n, ...] of all processes one after another, in the order of their ranks; n may differ."""
    if world_size(together) == 1:
        return own
    target, was = exchange_device(), own.device
    sizes = [torch.zeros(1, dtype=torch.int64, device=target) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(own)], device=target))
    longest = max(map(int, sizes))
    if not longest:
        return own
    padded = torch.zeros((longest, *own.shape[1:]), dtype=own.dtype, device=target)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)]).to(was)


def from_first(content: bytes, together: bool) -> bytes:
    """The content of the first process, in all of them."""
    mine = content if own_rank(together) == 0 else b""
    return bytes(all_rows(torch.tensor(list(mine), dtype=torch.uint8), together).tolist())
