"""Forward KL from final hidden states and heads, without the logits of the whole batch.

Over chunks of tokens, logits are accumulated in float32 and the gradient is written in closed form: for
L = T² · KL(softmax(z_t / T) || softmax(z_s / T)), dL/dz_s = T · (p_s - p_t). Rounding the logits to bfloat16 before that
difference, as is common, loses most of the gradient once the student is close to its teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 256


def linear_kl_div(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Mean over tokens of T² · KL(teacher || student), nats: a float32 scalar.

    student_hidden [N, d_s] and student_head [V, d_s] are differentiable; teacher_hidden [N, d_t] and teacher_head [V, d_t]
    are not. Any floating dtypes; the gradients come back in the dtype of their tensors. One chunk's logits,
    [256, V] in float32 for each side, are all that lives at a time.
    Source: arXiv 2407.14679 section 2.4 (L_logits); T² keeps the gradient's scale over temperatures.
    """
    loss: Tensor = _LinearKLDiv.apply(student_hidden, student_head, teacher_hidden, teacher_head, temperature)
    return loss


class _LinearKLDiv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, temperature: float
    ) -> Tensor:
        tokens = hidden.shape[0]
        need_hidden, need_head = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if need_hidden else None
        head_grad = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if need_head else None
        columns, teacher_columns = _columns(head), _columns(teacher_head)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, tokens, CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            target = torch.log_softmax(_logits(teacher_hidden[part], teacher_columns).div_(temperature), dim=-1)
            difference = torch.log_softmax(_logits(hidden[part], columns).div_(temperature), dim=-1)
            probability = target.exp()
            total += (probability * (target - difference)).sum(dim=-1).double().sum()
            if not (need_hidden or need_head):
                continue
            # p_s - p_t in float32, then rounded once: the products below lose no more than the operands' own precision
            gradient = difference.exp_().sub_(probability).mul_(temperature / tokens).to(head.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = gradient @ head
            if head_grad is not None:
                head_grad += gradient.T @ hidden[part].to(head.dtype)
        ctx.save_for_backward(hidden_grad, head_grad.to(head.dtype) if head_grad is not None else None)
        return (total * (temperature**2 / tokens)).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        (scale,) = gradients
        return (
            hidden_grad * scale.to(hidden_grad.dtype) if hidden_grad is not None else None,
            head_grad * scale.to(head_grad.dtype) if head_grad is not None else None,
            None,
            None,
            None,
        )


def _columns(head: Tensor) -> Tensor:
    """The head as the right-hand operand of `_logits`: widened once per call on CPUs, which have no bf16 product with a
    float32 result."""
    return head.T if head.is_cuda or head.dtype == torch.float32 else head.float().T


def _logits(hidden: Tensor, columns: Tensor) -> Tensor:
    """float32 [n, V], accumulated in float32."""
    if hidden.is_cuda and columns.dtype != torch.float32:
        return torch.mm(hidden.to(columns.dtype), columns, out_dtype=torch.float32)
    return hidden.float() @ columns
