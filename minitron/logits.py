"""Logits of one chunk of tokens at a time, accumulated in float32 for operands of any dtype.

The losses and the held-out metrics compute logits here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from minitron.arguments import check_model
from minitron.config_values import declared
from minitron.models import head_of

CHUNK_TOKENS = 512  # default for the largest number of tokens in a chunk
# Largest size of one model's float32 logits of a chunk; smaller on CPUs, whose memory other processes share.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
# CPUs process this many rows of logits, and values of a head, at a time, so that they stay in the cache.
CACHE_ROWS = 16
CACHE_VALUES = 1 << 19


class Head:
    """An output head: its weight [V, d], and the scaling and soft-capping of the logits.

    logits = softcap · tanh(scale · hidden @ weight.T / softcap), or scale · hidden @ weight.T if `softcap` is 0. They are
    computed without a graph for gradients.
    """

    def __init__(self, weight: Tensor, *, softcap: float = 0.0, scale: float = 1.0) -> None:
        self.weight = weight
        self.softcap = softcap
        self.scale = scale

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a transformers causal LM, with soft-capped (Gemma), multiplied (Cohere) or divided (Granite) logits.

        Raises InputError if the model's head is not a single matrix.
        """
        check_model("model", model)
        return cls.from_config(head_of(model), model.config)

    @classmethod
    def from_config(cls, weight: Tensor, config: Any) -> Head:
        """As `of`, from the output matrix [V, d] and the config of the model."""
        scale = (declared(config, "logit_scale") or 1.0) / (declared(config, "logits_scaling") or 1.0)
        return cls(weight, softcap=declared(config, "final_logit_softcapping") or 0.0, scale=scale)

    def to(self, device: torch.device) -> Head:
        """The same head on a device, detached from the graph for gradients."""
        return Head(self.weight.detach().to(device), softcap=self.softcap, scale=self.scale)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits of hidden states [n, d]: float32 [n, V], written to the first n rows of `out` (float32 [>= n, V]) if given."""
        logits = self.products(hidden, out)
        if self.softcap:
            return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def chunks(self, hidden: Tensor) -> Iterator[Tensor]:
        """Yield the logits of hidden states [n, d], float32 [chunk, V]. All chunks use the same memory: each overwrites the one
        before."""
        size = tokens_per_chunk(self.weight, CHUNK_TOKENS)
        # one buffer for all: the allocator returns blocks of this size to the system, and allocating them again is slow
        buffer = hidden.new_empty((min(size, len(hidden)), len(self.weight)), dtype=torch.float32)
        return (self.logits(part, buffer) for part in hidden.split(size))

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of `logits` [n, V] with respect to the products hidden @ weight.T: the same shape, or one number."""
        if not self.softcap:
            return self.scale
        return logits.div(self.softcap).square_().neg_().add_(1.0).mul_(self.scale)

    def products(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden @ weight.T without scaling and soft-capping: float32 [n, V], in the first n rows of `out` if given."""
        weight = self.weight.detach()
        hidden = hidden.detach().to(weight.dtype)
        out = None if out is None else out[: len(hidden)]
        if weight.dtype == torch.float32:
            return torch.mm(hidden, weight.T, out=out)
        if weight.is_cuda:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
        # PyTorch has no product of bfloat16 matrices with a float32 result on CPUs: convert one block of the head at a time
        hidden = hidden.float()
        out = hidden.new_empty(len(hidden), len(weight)) if out is None else out
        with _units_of(weight.dtype):
            for block in cache_blocks(weight):
                torch.mm(hidden, weight[block].float().T, out=out[:, block])
        return out


def tokens_per_chunk(head: Tensor, most: int) -> int:
    """Number of tokens in a chunk for a head [V, d]: at most `most`, and so that its logits take at most CHUNK_BYTES.

    It depends only on the vocabulary and the kind of device, not on the free memory, because chunks of another size may round
    differently.
    """
    return most_tokens(len(head), head.device.type, most)


def most_tokens(vocabulary: int, device: str, most: int) -> int:
    """`tokens_per_chunk` for a vocabulary size and a device type; a multiple of CACHE_ROWS if it is less than `most`."""
    fit = CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (4 * vocabulary)
    return min(most, max(CACHE_ROWS, fit // CACHE_ROWS * CACHE_ROWS))


@contextmanager
def _units_of(dtype: torch.dtype) -> Iterator[None]:
    """Let CPUs multiply float32 matrices in their bfloat16 units inside the context if the operands were converted from
    bfloat16, for which this is exact."""
    before = torch.get_float32_matmul_precision()
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def cache_slices(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows of `logits` [n, V] to process at a time: CACHE_ROWS rows on CPUs, all rows on GPUs."""
    size = len(logits) if logits.is_cuda else CACHE_ROWS
    for start in range(0, len(logits), max(1, size)):
        yield slice(start, start + size)


def cache_blocks(weight: Tensor) -> Iterator[slice]:
    """Slices of the rows of a head [V, d] to multiply with at a time: about CACHE_VALUES values on CPUs, all rows on GPUs."""
    size = len(weight) if weight.is_cuda else max(128, CACHE_VALUES // weight.shape[1])
    for start in range(0, len(weight), size):
        yield slice(start, start + size)


def cache_buffer(head: Tensor) -> Tensor | None:
    """Memory for temporary values of each of `cache_slices`, float32 [CACHE_ROWS, V], for a head [V, d]. None on GPUs, where
    PyTorch keeps what is freed for the next tensor of that size.

    The C library does not: what is freed is split by small results that are made before the next slice, which then takes new
    memory. A process would grow by the logits of all slices.
    """
    return None if head.is_cuda else head.new_empty((CACHE_ROWS, len(head)), dtype=torch.float32)


def first_rows(buffer: Tensor | None, logits: Tensor) -> Tensor | None:
    """The part of a `cache_buffer` that has the shape of a slice of logits, as an argument `out`."""
    return None if buffer is None else buffer[: len(logits)]


def logsumexp(logits: Tensor, *, out: Tensor) -> Tensor:
    """torch.logsumexp over the last dimension of [n, V], bit for bit: [n]. out: [n, V], overwritten; it may be the logits."""
    top = logits.amax(dim=-1, keepdim=True)
    top.masked_fill_(top.isinf(), 0.0)  # as PyTorch does: infinity minus itself is not a number
    return torch.sub(logits, top, out=out).exp_().sum(dim=-1).log_().add_(top[:, 0])


def log_softmax_(logits: Tensor, log_sum_exp: Tensor | None = None, *, buffer: Tensor | None = None) -> Tensor:
    """log_softmax over the last dimension of [n, V], in place. log_sum_exp: that of the logits, [n], if already computed.
    buffer: a `cache_buffer`, if the logits are one of `cache_slices`."""
    if log_sum_exp is None:
        own = first_rows(buffer, logits)
        log_sum_exp = torch.logsumexp(logits, dim=-1) if own is None else logsumexp(logits, out=own)
    return logits.sub_(log_sum_exp[:, None])


def log_softmax_slices_(logits: Tensor, buffer: Tensor | None) -> Tensor:
    """`log_softmax_` of a chunk of logits [n, V], one of `cache_slices` at a time. buffer: a `cache_buffer`."""
    for rows in cache_slices(logits):
        log_softmax_(logits[rows], buffer=buffer)
    return logits


def squared_sum_(logits: Tensor) -> Tensor:
    """Sum of the squares of a chunk of logits [n, V], which are squared in place: a float64 scalar.

    Rows are summed in float32: `sum(dtype=torch.float64)` of all of them would make a float64 copy first.
    """
    return logits.square_().sum(dim=-1).sum(dtype=torch.float64)


def softmax_(logits: Tensor, log_sum_exp: Tensor | None = None) -> Tensor:
    """softmax over the last dimension of [n, V], in place; returns the logits' log-sum-exp [n].

    log_sum_exp: the result to return, if already computed.
    """
    if log_sum_exp is not None:
        logits.sub_(log_sum_exp[:, None]).exp_()
        return log_sum_exp
    top = logits.amax(dim=-1, keepdim=True)
    total = logits.sub_(top).exp_().sum(dim=-1, keepdim=True)
    logits.div_(total)
    return top.add_(total.log_())[:, 0]
