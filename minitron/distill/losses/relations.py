"""The loss between relations of queries, keys or values within a layer (MiniLMv2, arXiv 2012.15828, equations 4 to 8)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_RELATIONS = 2**24  # relations that exist at a time: four tensors of 64 MiB in float32


def relation_loss(student: Tensor, teacher: Tensor, heads: int, block_relations: int = BLOCK_RELATIONS) -> Tensor:
    """float32 [rows]: mean KL(teacher || student), nats, of the relations softmax(x xᵀ / √d) of queries, keys or values.

    student [rows, seq_length, w_s] and teacher [rows, seq_length, w_t] are cut into `heads` relation heads of width d. Each
    position is related to all others, also to later ones: only the loss uses these relations, not the model. Differentiable
    only in `student`. Relations and their gradient are computed for a few positions at a time. The memory needed is float32
    [rows, seq_length, w_s] and blocks of `block_relations` (at least seq_length) instead of [rows, heads, seq_length,
    seq_length].
    """
    loss: Tensor = _RelationLoss.apply(student, teacher.detach(), heads, block_relations)
    return loss


class _RelationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, heads: int, block_relations: int) -> Tensor:
        rows, seq_length, width = student.shape
        own = _by_head(student, heads)
        other = _by_head(teacher, heads)
        divergence = own.new_zeros(len(own))
        gradient = torch.zeros_like(own) if ctx.needs_input_grad[0] else None
        for which, positions in _blocks(len(own), seq_length, block_relations):
            log_p = _log_relations(other[which], positions)
            log_q = _log_relations(own[which], positions)
            p = log_p.exp()
            q = log_q.exp()
            divergence[which] += log_p.sub_(log_q).mul_(p).sum(dim=(1, 2))
            if gradient is not None:
                keys = own[which]
                scores = q.sub_(p).div_(own.shape[-1] ** 0.5)  # d KL / d (x xᵀ); x is on both sides of the product
                gradient[which, positions] += scores @ keys
                gradient[which] += scores.transpose(1, 2) @ keys[:, positions]
        if gradient is not None:
            gradient = (
                gradient.div_(heads * seq_length).unflatten(0, (rows, heads)).transpose(1, 2).reshape(rows, -1, width)
            )
            ctx.save_for_backward(gradient)
            ctx.dtype = student.dtype
        return divergence.view(rows, heads).sum(dim=1) / (heads * seq_length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None, None]).to(ctx.dtype), None, None, None


def _by_head(values: Tensor, heads: int) -> Tensor:
    """float32 [rows * heads, seq_length, d]."""
    return values.float().unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)


def _log_relations(values: Tensor, positions: slice) -> Tensor:
    """Logarithms of the relations of some positions of [n, seq_length, d] to all: [n, len(positions), seq_length]."""
    scores = values[:, positions] @ values.transpose(1, 2)
    return torch.log_softmax(scores.div_(values.shape[-1] ** 0.5), dim=-1)


def _blocks(count: int, seq_length: int, block_relations: int) -> Iterator[tuple[slice, slice]]:
    """(rows and heads, positions) of blocks that cover all relations, each of at most `block_relations` relations or of one
    position."""
    several = max(1, block_relations // seq_length**2)
    positions = min(seq_length, max(1, block_relations // seq_length)) if several == 1 else seq_length
    for first in range(0, count, several):
        for start in range(0, seq_length, positions):
            yield slice(first, first + several), slice(start, start + positions)
