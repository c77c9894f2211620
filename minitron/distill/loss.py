"""Losses on logits from final hidden states and heads, without the logits of the whole batch.

Over chunks of tokens, logits are accumulated in float32 and the gradient is written in closed form: for
L = T² · D(softmax(z_t / T), softmax(z_s / T)), dL/dz_s = T · dD/du at u = z_s / T, with forward KL T · (p_s - p_t).
Rounding the logits to bfloat16 before that difference, as is common, loses most of the gradient once the student is
close to its teacher.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitron.distill.divergences import IGNORED, cross_entropy_, divergence
from minitron.distill.losses import Losses
from minitron.errors import InputError
from minitron.logits import Head, cache_slices

CHUNK_TOKENS = 512


class LogitLoss(NamedTuple):
    """`loss` is what to minimise, a float32 scalar; the parts have no gradient."""

    loss: Tensor
    divergence: Tensor
    """float32 [N], T² included; zeros with `logits: none`."""
    cross_entropy: Tensor
    """float32 scalar, mean over the tokens that have a label, not weighted; 0 where its weight is."""


def linear_logit_loss(
    student_hidden: Tensor,
    student_head: Head,
    losses: Losses,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    labels: Tensor | None = None,
) -> LogitLoss:
    """Mean over tokens of T² · D(teacher, student), plus `cross_entropy` times the mean loss of the next tokens; nats.

    student_hidden [N, d_s] and student_head.weight [V, d_s] are differentiable; teacher_hidden [N, d_t] and teacher_head
    [V, d_t] are not, and are not needed with `logits: none`. labels int64 [N], -100 for none, are needed where
    `losses.cross_entropy` is not 0. Any floating dtypes; gradients have the dtype of their tensors. One chunk's logits,
    float32 [512, V] for each side, are all that lives at a time. Raises InputError for vocabularies that differ.
    Source: arXiv 2407.14679 section 2.4 (L_CLM + L_logits).
    """
    vocabulary = student_head.weight.shape[0]
    if losses.logits == "none":
        teacher_hidden, teacher_head = None, None
    elif teacher_hidden is None or teacher_head is None:
        raise InputError(
            f"logits: {losses.logits} without a teacher", "give its hidden states and head, or logits: none"
        )
    elif teacher_head.weight.shape[0] != vocabulary:
        raise InputError(
            f"the teacher's vocabulary has {teacher_head.weight.shape[0]} tokens, the student's {vocabulary}",
            "distil from a teacher with the same tokenizer and head",
        )
    if losses.top_k > vocabulary:
        raise InputError(f"top_k: {losses.top_k} of a vocabulary of {vocabulary}", "use 0, which takes all of it")
    if not losses.cross_entropy:
        labels = None
    elif labels is None:
        raise InputError(f"cross_entropy: {losses.cross_entropy} without labels", "give the next tokens, int64 [N]")
    return LogitLoss(
        *_LinearLogitLoss.apply(
            student_hidden, student_head.weight, student_head, losses, teacher_hidden, teacher_head, labels
        )
    )


def linear_kl_div(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_head: Tensor | Head,
    temperature: float = 1.0,
) -> Tensor:
    """Mean over tokens of T² · KL(teacher || student), nats: a float32 scalar.

    student_hidden [N, d_s] and student_head [V, d_s] are differentiable; teacher_hidden [N, d_t] and teacher_head
    [V, d_t] are not. A head is its weight, or a `Head` made from it once, which soft-caps or scales if the model does.
    Otherwise as `linear_logit_loss`.
    """
    student = student_head if isinstance(student_head, Head) else Head(student_head)
    teacher = teacher_head if isinstance(teacher_head, Head) else Head(teacher_head)
    losses = Losses(temperature=temperature)
    return linear_logit_loss(student_hidden, student, losses, teacher_hidden=teacher_hidden, teacher_head=teacher).loss


class _LinearLogitLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        student: Head,
        losses: Losses,
        teacher_hidden: Tensor | None,
        teacher: Head | None,
        labels: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = hidden.shape[0]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if need_hidden else None
        weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        soft = torch.zeros(tokens, dtype=torch.float32, device=hidden.device)
        hard = torch.zeros_like(soft)
        labelled = 0 if labels is None else max(1, int((labels != IGNORED).sum()))
        for start in range(0, tokens, CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            target = None if teacher is None or teacher_hidden is None else teacher.logits(teacher_hidden[part])
            logits = student.logits(hidden[part])
            for rows in cache_slices(logits):
                slope = student.slope(logits[rows])
                own = None
                if labels is not None:
                    own = logits[rows].clone() if target is not None else logits[rows]
                    hard[part][rows] = cross_entropy_(own, labels[part][rows])
                    own.mul_(losses.cross_entropy / labelled)
                if target is not None:
                    soft[part][rows] = _divergence_(logits[rows], target[rows], losses, tokens)
                    if own is not None:
                        logits[rows] += own
                if isinstance(slope, Tensor) or slope != 1.0:
                    logits[rows] *= slope
            # p_s - p_t in float32, then rounded once: the products lose no more than the operands' own precision
            gradient = logits.to(weight.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = gradient @ weight
            if weight_grad is not None:
                weight_grad += gradient.T @ hidden[part].to(weight.dtype)
        ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype) if weight_grad is not None else None)
        cross_entropy = hard.double().sum() / max(1, labelled)
        loss = soft.double().mean() + losses.cross_entropy * cross_entropy
        parts = soft, cross_entropy.float()
        ctx.mark_non_differentiable(*parts)
        ctx.set_materialize_grads(False)
        return loss.float(), *parts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = gradients[0]
        return (
            hidden_grad * scale.to(hidden_grad.dtype) if hidden_grad is not None else None,
            weight_grad * scale.to(weight_grad.dtype) if weight_grad is not None else None,
            *(None,) * 5,
        )


def _divergence_(student: Tensor, teacher: Tensor, losses: Losses, tokens: int) -> Tensor:
    """T² · D of each token, float32 [n]; the student's logits become its gradient divided by the number of tokens."""
    temperature = losses.temperature
    if temperature != 1.0:
        student.div_(temperature)
        teacher.div_(temperature)
    loss = divergence(losses.logits, losses.top_k)(student, teacher)
    student.mul_(temperature / tokens)
    return loss.mul_(temperature**2) if temperature != 1.0 else loss
