"""Logits of a chunk of tokens, accumulated in float32 whatever the operands' dtype.

Everything that compares two models' distributions goes through here: the loss and the held-out measurements.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from minitron.models import head_of

CHUNK_TOKENS = 512  # whose logits exist at a time, at most, where nothing else is said
# Of one model's chunk of float32 logits. CPUs share their memory with everything else that runs beside.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
# What CPUs work on at a time, so that it stays in the cache: rows of logits, values of a head.
CACHE_ROWS = 16
CACHE_VALUES = 1 << 19


class Head:
    """An output head: weight [V, d], and what the model does to its products with hidden states.

    logits = softcap · tanh(scale · hidden @ weight.T / softcap), or scale · hidden @ weight.T where `softcap` is 0. No
    gradient flows through them.
    """

    def __init__(self, weight: Tensor, *, softcap: float = 0.0, scale: float = 1.0) -> None:
        self.weight = weight
        self.softcap = softcap
        self.scale = scale

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a transformers causal LM: soft-capped (Gemma), multiplied (Cohere) or divided (Granite) logits too.

        Raises InputError when the model has no plain output matrix.
        """
        return cls.from_config(head_of(model), model.config)

    @classmethod
    def from_config(cls, weight: Tensor, config: Any) -> Head:
        """The head of a transformers causal LM with this config and output matrix."""
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(weight, softcap=getattr(config, "final_logit_softcapping", None) or 0.0, scale=scale)

    def to(self, device: torch.device) -> Head:
        """The same head on a device, without its history of gradients."""
        return Head(self.weight.detach().to(device), softcap=self.softcap, scale=self.scale)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """float32 [n, V] of hidden states [n, d], in the first n rows of `out` if it is given."""
        logits = self.products(hidden, out)
        if self.softcap:
            return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def chunks(self, hidden: Tensor) -> Iterator[Tensor]:
        """The logits of hidden states [n, d], a chunk of tokens at a time; each is overwritten by the next."""
        size = tokens_per_chunk(self.weight, CHUNK_TOKENS)
        # one space for all: memory of this size goes back to the system when it is freed, and is slow to come again
        space = hidden.new_empty((min(size, len(hidden)), len(self.weight)), dtype=torch.float32)
        return (self.logits(part, space) for part in hidden.split(size))

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the logits with respect to the products hidden @ weight.T, from the logits."""
        if not self.softcap:
            return self.scale
        return logits.div(self.softcap).square_().neg_().add_(1.0).mul_(self.scale)

    def products(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """float32 hidden @ weight.T [n, V], in the first n rows of `out` if it is given."""
        weight = self.weight.detach()
        hidden = hidden.detach().to(weight.dtype)
        out = None if out is None else out[: len(hidden)]
        if weight.dtype == torch.float32:
            return torch.mm(hidden, weight.T, out=out)
        if weight.is_cuda:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
        # CPUs have no product of bf16 matrices with a float32 result: the operands are widened, a part of the head at a time
        hidden = hidden.float()
        out = hidden.new_empty(len(hidden), len(weight)) if out is None else out
        with _units_of(weight.dtype):
            for block in cache_blocks(weight):
                torch.mm(hidden, weight[block].float().T, out=out[:, block])
        return out


def tokens_per_chunk(head: Tensor, most: int) -> int:
    """Tokens whose logits exist at a time: at most `most`, and no more than CHUNK_BYTES hold of a head [V, d].

    That depends on the vocabulary and the kind of device alone, not on the memory that happens to be free: chunks of another
    size may round differently.
    """
    return most_tokens(len(head), head.device.type, most)


def most_tokens(vocabulary: int, device: str, most: int) -> int:
    """`tokens_per_chunk` of a vocabulary on a kind of device, a multiple of CACHE_ROWS where it is less than `most`."""
    fit = CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (4 * vocabulary)
    return min(most, max(CACHE_ROWS, fit // CACHE_ROWS * CACHE_ROWS))


@contextmanager
def _units_of(dtype: torch.dtype) -> Iterator[None]:
    """Let CPUs multiply float32 matrices with their bf16 units where that is exact, because the operands came from bf16."""
    before = torch.get_float32_matmul_precision()
    if dtype == torch.bfloat16:
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


def cache_blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of a head [V, d] to multiply with together: some on CPUs, all of them on GPUs."""
    size = len(weight) if weight.is_cuda else max(128, CACHE_VALUES // weight.shape[1])
    for start in range(0, len(weight), size):
        yield slice(start, start + size)


def log_softmax_(logits: Tensor, log_sum_exp: Tensor | None = None) -> Tensor:
    """log_softmax over the last dimension of [n, V], in place; `log_sum_exp` [n] is that of the logits, if it is known."""
    if log_sum_exp is None:
        log_sum_exp = torch.logsumexp(logits, dim=-1)
    return logits.sub_(log_sum_exp[:, None])


def softmax_(logits: Tensor, log_sum_exp: Tensor | None = None) -> Tensor:
    """softmax over the last dimension of [n, V], in place; returns the logits' log-sum-exp [n], which may be known before."""
    if log_sum_exp is not None:
        logits.sub_(log_sum_exp[:, None]).exp_()
        return log_sum_exp
    top = logits.amax(dim=-1, keepdim=True)
    total = logits.sub_(top).exp_().sum(dim=-1, keepdim=True)
    logits.div_(total)
    return top.add_(total.log_())[:, 0]
