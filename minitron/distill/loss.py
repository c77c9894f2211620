"""Forward KL from final hidden states and heads, without the logits of the whole batch.

Over chunks of tokens, logits are accumulated in float32 and the gradient is written in closed form: for
L = T² · KL(softmax(z_t / T) || softmax(z_s / T)), dL/dz_s = T · (p_s - p_t). Rounding the logits to bfloat16 before
that difference, as is common, loses most of the gradient once the student is close to its teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitron.logits import Head, cache_slices, log_softmax_

CHUNK_TOKENS = 512


def linear_kl_div(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor | Head,
    temperature: float = 1.0,
) -> Tensor:
    """Mean over tokens of T² · KL(teacher || student), nats: a float32 scalar.

    student_hidden [N, d_s] and student_head [V, d_s] are differentiable; teacher_hidden [N, d_t] and teacher_head
    [V, d_t] (or a `Head` made from it once) are not. Any floating dtypes; gradients have the dtype of their tensors.
    One chunk's logits, float32 [512, V] for each side, are all that lives at a time.
    Source: arXiv 2407.14679 section 2.4 (L_logits); T² keeps the gradient's scale over temperatures.
    """
    teacher = teacher_head if isinstance(teacher_head, Head) else Head(teacher_head)
    loss: Tensor = _LinearKLDiv.apply(student_hidden, student_head, teacher_hidden, teacher, temperature)
    return loss


class _LinearKLDiv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher: Head, temperature: float
    ) -> Tensor:
        tokens = hidden.shape[0]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if need_hidden else None
        weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        student = Head(weight)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, tokens, CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            target = teacher.logits(teacher_hidden[part])
            difference = student.logits(hidden[part])
            for rows in cache_slices(target):
                total += _difference_(difference[rows], target[rows], temperature)
            # p_s - p_t in float32, then rounded once: the products lose no more than the operands' own precision
            gradient = difference.mul_(temperature / tokens).to(weight.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = gradient @ weight
            if weight_grad is not None:
                weight_grad += gradient.T @ hidden[part].to(weight.dtype)
        ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype) if weight_grad is not None else None)
        return (total * (temperature**2 / tokens)).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        (scale,) = gradients
        return (
            hidden_grad * scale.to(hidden_grad.dtype) if hidden_grad is not None else None,
            weight_grad * scale.to(weight_grad.dtype) if weight_grad is not None else None,
            None,
            None,
            None,
        )


def _difference_(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Turn student logits [n, V] into p_s - p_t in place (the teacher's are spent); summed KL(p_t || p_s), float64."""
    if temperature != 1.0:
        student.div_(temperature)
        teacher.div_(temperature)
    log_softmax_(teacher)
    log_softmax_(student)
    probability = teacher.exp()
    divergence = torch.linalg.vecdot(probability, teacher.sub_(student)).double().sum()
    student.exp_().sub_(probability)
    return divergence
