"""What the ways to compute a loss on logits have in common: what goes in of a teacher, and what comes out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitron.distill.losses import Losses
from minitron.distill.teacher.live import TopK
from minitron.logits import Head


class Teacher(NamedTuple):
    """Hidden states [N, d] and head, with the log-sum-exp [N] of their logits if it is known; or the likeliest tokens."""

    hidden: Tensor | None = None
    head: Head | None = None
    log_sum_exp: Tensor | None = None
    top: TopK | None = None


class ClosedForm(torch.autograd.Function):
    """A loss of hidden states [N, d] and a head's weight [V, d] whose forward pass leaves their gradients in `ctx.gradients`,
    and whose other inputs, four, have none."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_logit_loss: backward was called twice; its gradients are kept for one call only")
        ours, ctx.gradients = ctx.gradients, None
        scaled = (None if gradient is None else gradient.mul_(gradients[0].to(gradient.dtype)) for gradient in ours)
        return (*scaled, *(None,) * 4)


def results(
    ctx: Any, losses: Losses, divergence: Tensor, cross_entropies: Tensor, labelled: Tensor | int
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its parts without a gradient: each token's `divergence` [N], T² included, as it came, and the mean of
    the `cross_entropies` [N] over the `labelled` tokens, at least 1."""
    cross_entropy = cross_entropies.double().sum() / labelled
    loss = divergence.double().mean() + losses.cross_entropy * cross_entropy
    parts = divergence, cross_entropy.float()
    ctx.mark_non_differentiable(*parts)
    ctx.set_materialize_grads(False)
    return loss.float(), *parts
