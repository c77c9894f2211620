"""Logits of a chunk of tokens, accumulated in float32 whatever the operands' dtype.

Everything that compares two models' distributions goes through here: the loss and the held-out measurements.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from minitron.models import head_of

CACHE_ROWS = 16  # on CPUs: rows of logits worked on at a time, so that they stay in the cache


class Head:
    """An output head, made ready once for many products: weight [V, d], and what the model does to the products.

    logits = softcap · tanh(scale · hidden @ weight.T / softcap), or scale · hidden @ weight.T where `softcap` is 0. The
    products use the weight as it is at the first call; no gradient flows through them.
    """

    def __init__(self, weight: Tensor, *, softcap: float = 0.0, scale: float = 1.0) -> None:
        self.weight = weight
        self.softcap = softcap
        self.scale = scale
        self.low_precision = weight.dtype != torch.float32

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a transformers causal LM: soft-capped (Gemma), multiplied (Cohere) or divided (Granite) logits too.

        Raises InputError when the model has no plain output matrix.
        """
        config = model.config
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(head_of(model), softcap=getattr(config, "final_logit_softcapping", None) or 0.0, scale=scale)

    def to(self, device: torch.device) -> Head:
        """The same head on a device, without its history of gradients."""
        return Head(self.weight.detach().to(device), softcap=self.softcap, scale=self.scale)

    @cached_property
    def columns(self) -> Tensor:
        weight = self.weight.detach()
        # CPUs have no product of bf16 matrices with a float32 result; there the operands are widened
        return weight.T if weight.is_cuda else weight.float().T

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """float32 [n, V] of hidden states [n, d], in `out` if it is given."""
        logits = self._products(hidden, out)
        if self.softcap:
            return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the logits with respect to the products hidden @ weight.T, from the logits."""
        if not self.softcap:
            return self.scale
        return logits.div(self.softcap).square_().neg_().add_(1.0).mul_(self.scale)

    def _products(self, hidden: Tensor, out: Tensor | None) -> Tensor:
        if self.weight.is_cuda and self.low_precision:
            return torch.mm(hidden.detach().to(self.weight.dtype), self.columns, out_dtype=torch.float32, out=out)
        hidden = hidden.detach().to(self.weight.dtype).float()
        if not self.low_precision:
            return torch.mm(hidden, self.columns, out=out)
        with _bf16_operands():
            return torch.mm(hidden, self.columns, out=out)


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
