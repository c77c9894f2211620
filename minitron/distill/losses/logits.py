"""Losses on logits from final hidden states and heads, without the logits of the whole batch in memory.

Logits are accumulated in float32 for one chunk of tokens at a time, and their gradient is computed in closed form: for
L = T² · D(softmax(z_t / T), softmax(z_s / T)) it is dL/dz_s = T · dD/du at u = z_s / T; for forward KL, T · (p_s - p_t).
Rounding the logits to bfloat16 before this difference, as is common, loses most of the gradient when the student is close to
its teacher. `fused` is the implementation for GPUs, `chunked` the one for any device.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from minitron.arguments import check_type
from minitron.distill.losses import Losses, fused
from minitron.distill.losses.chunked import ChunkedLogitLoss
from minitron.distill.losses.closed_form import Teacher
from minitron.distill.teacher.live import TopK
from minitron.errors import InputError
from minitron.logits import Head


class LogitLoss(NamedTuple):
    """`loss` is the objective, a float32 scalar; the other fields have no gradient."""

    loss: Tensor
    divergence: Tensor
    """float32 [N], T² included; zeros if `Losses.logits` is "none"."""
    cross_entropy: Tensor
    """float32 scalar, nats: mean over the tokens with a label, not weighted; 0 if its weight is 0."""


def linear_logit_loss(
    student_hidden: Tensor,
    student_head: Head,
    losses: Losses,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    teacher_log_sum_exp: Tensor | None = None,
    teacher_top_k: TopK | None = None,
    labels: Tensor | None = None,
) -> LogitLoss:
    """T² · D(teacher, student), plus `losses.cross_entropy` times the cross-entropy with the labels; means over tokens, nats.

    student_hidden [N, d_s] and student_head.weight [V, d_s] are differentiable. teacher_hidden [N, d_t] and
    teacher_head.weight [V, d_t] are not; they are not needed if `losses.logits` is "none". teacher_log_sum_exp: that of the
    teacher's logits, float32 [N], if already computed; it saves passes over them at temperature 1. teacher_top_k: the
    teacher's top-k tokens instead of its hidden states, for `losses.top_k` up to this k. labels: next tokens, int64 [N], -100
    for none; needed if `losses.cross_entropy` is not 0. All floating dtypes are supported; a gradient has the dtype of its
    tensor. `backward` can be called once.

    Memory: the logits of one chunk of tokens for each model, float32 [256, V] on CPUs, [512, V] on GPUs and [1024, V] in the
    fused loss, or fewer tokens if that exceeds 128 MiB on CPUs or 512 MiB on GPUs. The fused loss also needs up to 2 GiB for
    the gradient of the logits. Raises InputError for different vocabularies, and for a missing teacher or missing labels.
    Source: arXiv 2407.14679 section 2.4 (L_CLM + L_logits).
    """
    check_type("student_hidden", student_hidden, Tensor, "a tensor")
    check_type("student_head", student_head, Head, "a Head")
    check_type("losses", losses, Losses, "a Losses")
    vocabulary = student_head.weight.shape[0]
    if losses.top_k > vocabulary:
        raise InputError(
            f"top_k: {losses.top_k} is more than the vocabulary of {vocabulary} tokens",
            "use 0 for the whole vocabulary",
        )
    teacher: Teacher | None = None
    if losses.logits == "none":
        pass
    elif teacher_top_k is not None:
        stored = teacher_top_k.log_probs.shape[1]
        if not 1 <= losses.top_k <= stored:
            raise InputError(
                f"top_k: {losses.top_k}, but the teacher's {stored} most likely tokens are stored",
                f"use logits: forward_kl with top_k: {stored}, or store its hidden states",
            )
        teacher = Teacher(top=teacher_top_k)
    elif teacher_hidden is None or teacher_head is None:
        raise InputError(
            f"logits: {losses.logits} without a teacher", "give its hidden states and head, or logits: none"
        )
    elif teacher_head.weight.shape[0] != vocabulary:
        raise InputError(
            f"the teacher's vocabulary has {teacher_head.weight.shape[0]} tokens, the student's {vocabulary}",
            "distil from a teacher with the same tokenizer and head",
        )
    else:
        teacher = Teacher(teacher_hidden, teacher_head, teacher_log_sum_exp if losses.temperature == 1.0 else None)
    if not losses.cross_entropy:
        labels = None
    elif labels is None:
        raise InputError(f"cross_entropy: {losses.cross_entropy} without labels", "give the next tokens, int64 [N]")
    function = fused.FusedLogitLoss if fused.available(student_head.weight) else ChunkedLogitLoss
    return LogitLoss(*function.apply(student_hidden, student_head.weight, student_head, losses, teacher, labels))


def linear_kl_div(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_head: Tensor | Head,
    temperature: float = 1.0,
) -> Tensor:
    """Mean over tokens of T² · KL(teacher || student), nats: a float32 scalar.

    student_hidden [N, d_s] and student_head [V, d_s] are differentiable; teacher_hidden [N, d_t] and teacher_head [V, d_t] are
    not. A head is its weight, or `Head.of(model)`, which includes the model's soft-capping and scaling of logits. Dtypes,
    memory and errors are those of `linear_logit_loss`; also raises InputError for arguments that are not tensors.
    """
    check_type("student_hidden", student_hidden, Tensor, "a tensor")
    check_type("teacher_hidden", teacher_hidden, Tensor, "a tensor")
    for name, head in (("student_head", student_head), ("teacher_head", teacher_head)):
        check_type(name, head, (Tensor, Head), "a tensor or a Head")
    student = student_head if isinstance(student_head, Head) else Head(student_head)
    teacher = teacher_head if isinstance(teacher_head, Head) else Head(teacher_head)
    losses = Losses(temperature=temperature)
    return linear_logit_loss(student_hidden, student, losses, teacher_hidden=teacher_hidden, teacher_head=teacher).loss
