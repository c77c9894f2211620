"""What a training step costs whatever the hardware: bytes that operations move, bytes that processes exchange, and times that
the host waits for a GPU."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitron.distill import preparation
from minitron.distill.timing import Stopwatch

# operations whose result's value or size the host reads, and methods that copy to main memory, which on CPUs do nothing
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}
READS = {Tensor.tolist, Tensor.cpu, Tensor.numpy}
INDEXING = {"index", "index_put", "index_put_"}  # with a mask
LOCAL = {"wait_tensor", "_wrap_tensor_autograd"}  # of the operations of torch.distributed, those that send nothing
OVERWRITING = {"copy_", "_foreach_copy_", "fill_", "zero_"}  # what is there is not read


class StepCounts(TorchDispatchMode):
    """Counts each step of trainings within the block, in the thread that trains.

    `moved` has, for each step, the bytes that are read and written in "teacher", "forward" (the student's), "loss", "backward"
    (with the sums of gradients) and "optimizer" (with clipping): of every operation its tensors' values, without views, and as
    if nothing were kept in a cache. `exchanged` has, for each step and kind of collective, the bytes of whole tensors: after an
    all-gather, before a reduce-scatter, or all-reduced. `waits` has, for each step, what would make the host wait for a GPU,
    by operation and line of this package.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[Counter[str]] = []
        self.exchanged: list[Counter[str]] = []
        self.waits: list[Counter[str]] = []
        self._begin()

    def _begin(self) -> None:
        self._moved, self._exchanged, self._waits = Counter[str](), Counter[str](), Counter[str]()
        self._bytes, self._last = 0, ""

    def lap(self, part: str) -> None:
        """The end of a part of a step, as a `Stopwatch` is told."""
        if part == "student":
            part = "backward" if self._last == "loss" else "forward"
        self._last = part
        self._moved[part] += self._bytes
        self._bytes = 0
        if part == "optimizer":
            self.moved.append(self._moved)
            self.exchanged.append(self._exchanged)
            self.waits.append(self._waits)
            self._begin()

    def __enter__(self) -> StepCounts:
        counts = self

        class Watch(Stopwatch):
            def lap(self, part: str) -> None:
                counts.lap(part)
                super().lap(part)

        class Reads(TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
                if function in READS:
                    counts._wait(function.__name__)
                return function(*arguments, **(named or {}))

        self._inside = ExitStack()
        self._inside.enter_context(patch.object(preparation, "Stopwatch", Watch))
        self._inside.enter_context(Reads())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._inside.close()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # its parts are counted
        named = named or {}
        library, name = function._schema.name.split("::")
        if waits(name, arguments):
            self._wait(name)
        result = function(*arguments, **named)
        if "c10d" in library:
            if name not in LOCAL:
                self._exchanged[name] += max(leaf.nbytes for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
            return result
        self.move(_moved(function._schema, name, arguments, named, result))
        return result

    def move(self, tensors: Iterable[Tensor]) -> None:
        """Count the values of these tensors, which were read or written."""
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _wait(self, name: str) -> None:
        own = [
            frame
            for frame in traceback.extract_stack()
            if "/minitron/" in frame.filename and "/tests/" not in frame.filename
        ]
        file = own[-1].filename.rsplit("/minitron/", 1)[1]
        self._waits[f"{name} in {file}: {own[-1].line}"] += 1


def waits(name: str, arguments: Any) -> bool:
    """Whether an operation makes the host wait for a GPU, by its name without the overload."""
    masks = [leaf for leaf in tree_leaves(arguments[1:2]) if isinstance(leaf, Tensor)]
    return name in WAITS or (name in INDEXING and any(mask.dtype == torch.bool for mask in masks))


def _moved(schema: Any, name: str, arguments: Any, named: Any, result: Any) -> list[Tensor]:
    """What an operation read, and what it wrote."""
    read, written = [], []
    for number, argument in enumerate(schema.arguments):
        positional = number < len(arguments) and not argument.kwarg_only
        value = arguments[number] if positional else named.get(argument.name)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes:
            written += tensors
        if not (writes and (name in OVERWRITING or argument.is_out)):
            read += tensors
    if not written:
        if "empty" in name or any(r.alias_info for r in schema.returns):
            return []
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return read + written
