"""Logits of a chunk of tokens, accumulated in float32 whatever the operands' dtype.

Everything that compares two models' distributions goes through here: the loss and the held-out measurements.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

CACHE_ROWS = 16  # on CPUs: rows of logits worked on at a time, so that they stay in the cache


class Head:
    """An output head [V, d], made ready once for many products."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self.low_precision = self.weight.dtype != torch.float32
        # CPUs have no product of bf16 matrices with a float32 result; there the operands are widened
        self.columns = self.weight.T if self.weight.is_cuda else self.weight.float().T

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [n, V] of hidden states [n, d]."""
        if self.weight.is_cuda and self.low_precision:
            return torch.mm(hidden.to(self.weight.dtype), self.columns, out_dtype=torch.float32)
        hidden = hidden.detach().to(self.weight.dtype).float()
        if not self.low_precision:
            return hidden @ self.columns
        with _bf16_operands():
            return hidden @ self.columns


@contextmanager
def _bf16_operands() -> Iterator[None]:
    """Let CPUs multiply float32 matrices with their bf16 units: exact here, because the operands came from bf16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def cache_slices(logits: Tensor) -> Iterator[slice]:
    """Rows to work on together: a few on CPUs, all of them on GPUs."""
    size = len(logits) if logits.is_cuda else CACHE_ROWS
    for start in range(0, len(logits), max(1, size)):
        yield slice(start, start + size)


def log_softmax_(logits: Tensor) -> Tensor:
    """log_softmax over the last dimension, in place."""
    return logits.sub_(torch.logsumexp(logits, dim=-1, keepdim=True))
