"""Divergences between a student's and a teacher's next-token distributions, with their gradients in closed form.

Every function takes logits of the student and of the teacher, float32 [n, V], and returns the loss of each token, float32 [n].
It works in place: afterwards the student's logits contain the gradient with respect to them, and the teacher's logits are
overwritten. known: the log-sum-exp of the teacher's logits, [n], if already computed.
Source: arXiv 2407.14679 section 2.4 (L_logits, a loss between the softmax probabilities p_t and p_s).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from minitron.logits import log_softmax_, softmax_

IGNORED = -100  # the label of a token without a next token, as in PyTorch's cross_entropy
Divergence = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def forward_kl_(student: Tensor, teacher: Tensor, known: Tensor | None) -> Tensor:
    """KL(p_t || p_s), nats; gradient p_s - p_t. Every exponential is computed once."""
    ratio = teacher - student
    offset = softmax_(teacher, known) - softmax_(student)
    loss = torch.linalg.vecdot(teacher, ratio.sub_(offset[:, None]))  # log p_t / p_s = z_t - z_s - offset
    student.sub_(teacher)
    return loss


def forward_kl_of_top_k_(student: Tensor, teacher: Tensor, known: Tensor | None, k: int) -> Tensor:
    """`forward_kl_to_tokens_` for the teacher's `k` most likely tokens."""
    return forward_kl_to_tokens_(student, *teacher.topk(k, dim=-1))


def forward_kl_to_tokens_(student: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
    """KL(p_k || p_s), nats; gradient p_s - p_k. p_k is the softmax of `values` [n, k], the teacher's logits or
    log-probabilities of `tokens`, int64 [n, k]."""
    log_softmax_(values)
    log_softmax_(student)
    probability = values.exp()
    loss = torch.linalg.vecdot(probability, values.sub_(student.gather(1, tokens)))
    student.exp_().scatter_add_(1, tokens, probability.neg_())
    return loss


def reverse_kl_(student: Tensor, teacher: Tensor, known: Tensor | None) -> Tensor:
    """KL(p_s || p_t), nats; gradient p_s · (log p_s - log p_t - KL)."""
    log_softmax_(student)
    log_softmax_(teacher, known)
    slope = teacher.neg_().add_(student)
    return _through_softmax_(student.exp_(), slope)


def jensen_shannon_(student: Tensor, teacher: Tensor, known: Tensor | None) -> Tensor:
    """½ KL(p_t || m) + ½ KL(p_s || m) with m = (p_t + p_s) / 2, nats; dL/dp_s = ½ log(p_s / m)."""
    log_softmax_(student)
    log_softmax_(teacher, known)
    probability = teacher.exp()
    ratio = teacher.sub_(student)  # log p_t / p_s
    own = functional.softplus(ratio).neg_().add_(math.log(2))  # log p_s / m
    teacher_term = torch.linalg.vecdot(probability, ratio.add_(own))  # KL(p_t || m)
    return _through_softmax_(student.exp_(), own.mul_(0.5)).add_(teacher_term, alpha=0.5)


def squared_error_(student: Tensor, teacher: Tensor, known: Tensor | None) -> Tensor:
    """Σ (p_s - p_t)² over the vocabulary; dL/dp_s = 2 (p_s - p_t)."""
    softmax_(teacher, known)
    softmax_(student)
    slope = teacher.neg_().add_(student)
    loss = torch.linalg.vecdot(slope, slope)
    _through_softmax_(student, slope.mul_(2))
    return loss


def cosine_(student: Tensor, teacher: Tensor, known: Tensor | None) -> Tensor:
    """1 - cos(p_s, p_t), computed as ½ |d|² with d = p_s / |p_s| - p_t / |p_t| to avoid cancellation for similar distributions;
    dL/dp_s = (d - L · p_s / |p_s|) / |p_s|."""
    softmax_(teacher, known)
    softmax_(student)
    length = student.norm(dim=-1, keepdim=True)
    direction = student / length
    slope = teacher.div_(teacher.norm(dim=-1, keepdim=True)).neg_().add_(direction)
    loss = torch.linalg.vecdot(slope, slope).mul_(0.5)
    _through_softmax_(student, slope.addcmul_(direction, -loss[:, None]).div_(length))
    return loss


def cross_entropy_(student: Tensor, labels: Tensor) -> Tensor:
    """-log p_s of the labels, int64 [n], nats; gradient p_s - onehot(label). Both are 0 for the label -100."""
    ignored = labels == IGNORED
    tokens = labels.masked_fill(ignored, 0)[:, None]
    loss = -log_softmax_(student).gather(1, tokens)[:, 0]
    student.exp_().scatter_add_(1, tokens, student.new_full(tokens.shape, -1.0))
    student.masked_fill_(ignored[:, None], 0.0)
    return loss.masked_fill_(ignored, 0.0)


def _through_softmax_(probability: Tensor, slope: Tensor) -> Tensor:
    """Backward pass of a softmax: turn p = softmax(z) into dL/dz = p · (slope - Σ p · slope) in place, where slope is dL/dp
    up to a constant. Returns Σ p · slope."""
    mean = torch.linalg.vecdot(probability, slope)
    probability.mul_(slope.sub_(mean[:, None]))
    return mean


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl_,
    "reverse_kl": reverse_kl_,
    "jensen_shannon": jensen_shannon_,
    "mse": squared_error_,
    "cosine": cosine_,
}


def divergence(name: str, top_k: int = 0) -> Divergence:
    """The divergence with this name in DIVERGENCES; with `top_k`, forward KL to the teacher's `top_k` most likely tokens."""
    return partial(forward_kl_of_top_k_, k=top_k) if top_k else DIVERGENCES[name]
