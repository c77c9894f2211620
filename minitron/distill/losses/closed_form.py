"""The common base of the chunked and the fused loss on logits: the teacher's input, and the results."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitron.distill.losses import Losses
from minitron.distill.teacher.live import TopK
from minitron.logits import Head, cache_blocks


class Teacher(NamedTuple):
    """A teacher's distributions at N tokens: final hidden states [N, d] and head, optionally with the log-sum-exp [N] of the
    logits; or its top-k tokens."""

    hidden: Tensor | None = None
    head: Head | None = None
    log_sum_exp: Tensor | None = None
    top: TopK | None = None


class ClosedForm(torch.autograd.Function):
    """A loss whose forward pass computes the gradients of its first two inputs, hidden states [N, d] and a head's weight
    [V, d], and stores them in `ctx.gradients`; its other four inputs have no gradient."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_logit_loss: backward was called twice; its gradients are kept for one call only")
        stored = ctx.gradients
        ctx.gradients = None  # they are scaled in place
        scaled = (None if gradient is None else _scale_(gradient, gradients[0]) for gradient in stored)
        return (*scaled, *(None,) * 4)


def _scale_(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient [n, m] of any floating dtype, multiplied in place by a float32 scalar.

    Such as a micro-batch's share of a step, 1/1152, which bfloat16 has no number near enough to: the products are computed in
    float32 and rounded once. Only a factor with a dimension keeps its dtype beside a matrix.
    """
    factor = upstream.view(1)
    for block in cache_blocks(gradient):  # CPUs convert what they multiply into memory of its own
        torch.mul(gradient[block], factor, out=gradient[block])
    return gradient


def results(
    ctx: Any, losses: Losses, divergence: Tensor, cross_entropies: Tensor, labelled: Tensor | int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, divergence, cross-entropy) as the three outputs of a `ClosedForm`; the last two have no gradient.

    divergence: float32 [N], T² included; returned unchanged. cross_entropies: float32 [N]. labelled: number of tokens with a
    label, at least 1, over which the cross-entropy is averaged.
    """
    cross_entropy = cross_entropies.double().sum() / labelled
    loss = divergence.double().mean() + losses.cross_entropy * cross_entropy
    parts = divergence, cross_entropy.float()
    ctx.mark_non_differentiable(*parts)
    ctx.set_materialize_grads(False)
    return loss.float(), *parts
