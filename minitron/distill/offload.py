"""The update of master weights in main memory, slice by slice: while the CPU computes, the next gradients come from the GPU and
the last new weights go there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minitron.distill.activations import FLOAT

SLICE_VALUES = 1 << 26
"""Most values of a slice, and of the slices that are updated together. A multiple of 16, so that AdamW on a CPU, which takes
whole cache lines at a time, computes every value as it would in a whole tensor."""
BUFFERS = 2
"""Staging buffers of each direction: one is copied while the CPU works on the other."""


def buffer_sizes(values: int, value_bytes: int) -> list[int]:
    """Size in bytes of each staging buffer: for the float32 gradients of `values` parameters, and for their new weights, which
    have `value_bytes` bytes each."""
    largest = min(SLICE_VALUES, values)
    return BUFFERS * [FLOAT * largest, value_bytes * largest]


def sliced(
    tensors: Sequence[tuple[Tensor, Tensor, Tensor]], parameters: Sequence[nn.Parameter]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The slices of each parameter's master and two moments, contiguous tensors of its shape, in their order: flat views of at
    most `SLICE_VALUES` values. Those of a parameter that is not contiguous itself are not divided."""
    slices: list[tuple[Tensor, Tensor, Tensor]] = []
    for whole, parameter in zip(tensors, parameters, strict=True):
        slices += zip(*(_slices(tensor, parameter) for tensor in whole), strict=True)
    return slices


def _slices(tensor: Tensor, parameter: nn.Parameter) -> tuple[Tensor, ...]:
    return tensor.view(-1).split(SLICE_VALUES) if parameter.is_contiguous() else (tensor,)


class OffloadedStep:
    """Steps `optimizer`, whose parameters are the `sliced` float32 masters of `parameters` in main memory, and rounds the new
    weights into `parameters`, which have any dtype and are on one GPU or in main memory.

    On a GPU copies are made through pinned buffers in two streams, and the host waits only until a gradient is in its buffer
    or a buffer is free again. Without one the same buffers are ordinary memory.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: Optimizer) -> None:
        self.parameters, self.optimizer = parameters, optimizer
        self._batches = list(_batches(parameters, optimizer.param_groups[0]["params"]))
        gpu = next((parameter.device for parameter in parameters if parameter.is_cuda), None)
        values = [sum(piece.master.numel() for piece in batch) for batch in self._batches]
        dtypes = [self.parameters[batch[0].parameter].dtype for batch in self._batches]
        self._gradients = _Staging([(size, torch.float32) for size in values], gpu)
        self._weights = _Staging(list(zip(values, dtypes, strict=True)), gpu)

    @property
    def staging_bytes(self) -> int:
        """Bytes of main memory of the buffers."""
        return sum(buffer.nbytes for staging in (self._gradients, self._weights) for buffer in staging.buffers)

    @torch.no_grad()
    def update(self, sums: list[Tensor | None]) -> None:
        """Step with these float32 gradients of the parameters. Each becomes None in the list when it is in main memory, so
        that it does not stay on the GPU. A parameter without gradient is left as it is."""
        self._gradients.follow()  # and so, since the host waits for these copies, all that it does here
        following = self._fetch(0, sums)
        for number, batch in enumerate(self._batches):
            gradients, following = following, self._fetch(number + 1, sums)
            self._gradients.wait(number)
            for piece, gradient in zip(batch, gradients, strict=True):
                piece.master.grad = gradient
                if piece.is_last:
                    sums[piece.parameter] = None
            self.optimizer.step()
            for piece in batch:
                piece.master.grad = None
            self._send(number)
        self._weights.join()

    @torch.no_grad()
    def round(self) -> None:
        """Round the masters into the working weights."""
        self._weights.follow()
        for number in range(len(self._batches)):
            self._send(number)
        self._weights.join()

    def _fetch(self, number: int, sums: list[Tensor | None]) -> list[Tensor | None]:
        """Start to copy the gradients of a batch, if there is one, into the buffer that the CPU does not work on."""
        if number == len(self._batches):
            return []
        batch = self._batches[number]
        found = [None if (total := sums[piece.parameter]) is None else self._slice(total, piece) for piece in batch]
        staged = self._gradients.views(number, batch)
        self._gradients.copy(
            number, [(to, total) for to, total in zip(staged, found, strict=True) if total is not None]
        )
        return [None if total is None else to for to, total in zip(staged, found, strict=True)]

    def _send(self, number: int) -> None:
        """Round the new weights of a batch, and start to copy them to the working weights."""
        batch = self._batches[number]
        self._weights.wait(number)
        staged = self._weights.views(number, batch)
        for to, piece in zip(staged, batch, strict=True):
            to.copy_(piece.master)
        working = [self._slice(self.parameters[piece.parameter].detach(), piece) for piece in batch]
        self._weights.copy(number, list(zip(working, staged, strict=True)))

    def _slice(self, tensor: Tensor, piece: _Slice) -> Tensor:
        return _slices(tensor, self.parameters[piece.parameter])[piece.part]


class _Slice(NamedTuple):
    parameter: int
    """Its number."""
    part: int
    """Number of the slice in the parameter."""
    is_last: bool
    master: Tensor


def _batches(parameters: Sequence[nn.Parameter], masters: Sequence[Tensor]) -> Iterator[list[_Slice]]:
    """Slices that are updated together: some that follow each other, of parameters of one dtype, with at most `SLICE_VALUES`
    values unless one alone has more. Small parameters are not worth a copy and a wait each."""
    batch: list[_Slice] = []
    values = 0
    remaining = iter(masters)
    for index, parameter in enumerate(parameters):
        count = len(_slices(parameter.detach(), parameter))
        for number in range(count):
            own = _Slice(index, number, number == count - 1, next(remaining))
            other = bool(batch) and parameters[batch[0].parameter].dtype != parameter.dtype
            if batch and (other or values + own.master.numel() > SLICE_VALUES):
                yield batch
                batch, values = [], 0
            batch.append(own)
            values += own.master.numel()
    if batch:
        yield batch


class _Staging:
    """Buffers that batches take in turn between the CPU and the GPU, each large enough for any batch, with the stream of their
    copies in one direction."""

    def __init__(self, batches: Sequence[tuple[int, torch.dtype]], gpu: torch.device | None) -> None:
        self.gpu = gpu
        self.dtypes = [dtype for _, dtype in batches]
        size = max((values * dtype.itemsize for values, dtype in batches), default=0)
        self.buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=gpu is not None) for _ in range(BUFFERS)]
        self._stream = None if gpu is None else torch.cuda.Stream(gpu)
        self._copied: list[torch.cuda.Event | None] = [None] * BUFFERS

    def views(self, number: int, batch: Sequence[_Slice]) -> list[Tensor]:
        """A part of this batch's buffer for each of its slices, of the same shape."""
        dtype, buffer = self.dtypes[number], self.buffers[number % BUFFERS]
        sizes = [piece.master.numel() for piece in batch]
        parts = buffer[: sum(sizes) * dtype.itemsize].view(dtype).split(sizes)
        return [part.view(piece.master.shape) for part, piece in zip(parts, batch, strict=True)]

    def copy(self, number: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start to copy into the first of each pair what is in the second one. One of them is in this batch's buffer."""
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            self._copied[number % BUFFERS] = self._stream.record_event()

    def wait(self, number: int) -> None:
        """Until the last copy from or to the buffer of this batch has been made."""
        if (copied := self._copied[number % BUFFERS]) is not None:
            copied.synchronize()

    def follow(self) -> None:
        """Make the next copies after what the GPU was told to compute until now."""
        if self._stream is not None:
            self._stream.wait_event(torch.cuda.current_stream(self.gpu).record_event())

    def join(self) -> None:
        """Let the GPU compute the next things after all copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self.gpu).wait_event(self._stream.record_event())
