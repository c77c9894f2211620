"""Values that the processes of a training exchange. They travel as JSON in tensors: torch.distributed's own functions for
objects unpickle what arrives, and a pickle can run code."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from minitron.errors import (
    InputError,
    MinitronError,
    MissingFileError,
    NonFiniteError,
    NotWritableError,
    StorageError,
    TakenOverError,
)

LARGEST = 1 << 30  # bytes of a value
_ERRORS = {
    kind.__name__: kind
    for kind in (
        MinitronError,
        InputError,
        StorageError,
        NotWritableError,
        MissingFileError,
        TakenOverError,
        NonFiniteError,
    )
}


def exchange_device(group: Any = None) -> torch.device:
    """Where tensors are that the processes of the group exchange."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def gather_json(value: Any, group: Any = None) -> list[Any]:
    """`value`, a JSON value, of every process of the group, in the order of their ranks. Floats keep all their bits."""
    device = exchange_device(group)
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    world = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device), group=group)
    lengths = [int(size) for size in sizes]
    if not all(0 < length <= LARGEST for length in lengths):
        raise MinitronError(f"the processes exchange values of {lengths} bytes; at most {LARGEST:,} are possible")
    sent = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    sent[: len(data)] = data.to(device)
    received = [torch.empty_like(sent) for _ in range(world)]
    dist.all_gather(received, sent, group=group)
    return [json.loads(bytes(tensor[:length].cpu().numpy())) for tensor, length in zip(received, lengths, strict=True)]


def gather_results(work: Callable[[], Any], group: Any) -> list[Any]:
    """The JSON values that `work` returns in every process of the group; an error that a user can fix is raised in all.

    Of several errors that of the lowest rank is raised. In the other processes it has the same problem and remedy, and the
    nearest class of `minitron.errors`.
    """
    failure: OSError | MinitronError | None = None
    value = None
    try:
        value = work()
    except (OSError, MinitronError) as error:
        failure = error
    records = gather_json([value, None if failure is None else _record(failure)], group)
    for rank, (_, record) in enumerate(records):
        if record is not None:
            raise failure if failure is not None and rank == dist.get_rank(group) else _error(record)
    return [value for value, _ in records]


def _record(error: OSError | MinitronError) -> dict[str, Any]:
    if isinstance(error, MinitronError):
        kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS)
        return {"kind": kind, "problem": error.problem, "remedy": error.remedy}
    return {
        "errno": error.errno,
        "problem": error.strerror or str(error),
        "file": error.filename and str(error.filename),
    }


def _error(record: dict[str, Any]) -> OSError | MinitronError:
    if "kind" in record:
        return _ERRORS[record["kind"]](record["problem"], record["remedy"])
    return OSError(record["errno"], record["problem"], record["file"])
