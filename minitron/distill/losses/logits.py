"""Losses on logits from final hidden states and heads, without the logits of the whole batch.

Over chunks of tokens, logits are accumulated in float32 and the gradient is written in closed form: for
L = T² · D(softmax(z_t / T), softmax(z_s / T)), dL/dz_s = T · dD/du at u = z_s / T, with forward KL T · (p_s - p_t).
Rounding the logits to bfloat16 before that difference, as is common, loses most of the gradient once the student is
close to its teacher. `fused` does it by a kernel on GPUs, `chunked` anywhere.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from minitron.distill.losses import Losses, fused
from minitron.distill.losses.chunked import ChunkedLogitLoss
from minitron.distill.losses.closed_form import Teacher
from minitron.distill.teacher.live import TopK
from minitron.errors import InputError
from minitron.logits import Head


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
    teacher_log_sum_exp: Tensor | None = None,
    teacher_top_k: TopK | None = None,
    labels: Tensor | None = None,
) -> LogitLoss:
    """Mean over tokens of T² · D(teacher, student), plus `cross_entropy` times the mean loss of the next tokens; nats.

    student_hidden [N, d_s] and student_head.weight [V, d_s] are differentiable; teacher_hidden [N, d_t] and teacher_head
    [V, d_t] are not, and are not needed with `logits: none`. teacher_log_sum_exp float32 [N] is that of the teacher's
    logits, where it is known; with temperature 1 it saves passes over them. `teacher_top_k` is all that is known of some
    teachers, and serves `losses.top_k` up to its k. labels int64 [N], -100 for none, are needed where
    `losses.cross_entropy` is not 0. Any floating dtypes; gradients have the dtype of their tensors. Of the logits a
    chunk's alone live at a time, float32 [256, V] for each side on CPUs, [512, V] on GPUs, [1024, V] in the fused loss, and
    fewer tokens of vocabularies so large that these would take more than 128 MiB on CPUs or 512 MiB on GPUs. The fused loss
    keeps up to 2 GiB of their gradient beside. `backward` can be called once.
    Raises InputError for vocabularies that differ.
    Source: arXiv 2407.14679 section 2.4 (L_CLM + L_logits).
    """
    vocabulary = student_head.weight.shape[0]
    if losses.top_k > vocabulary:
        raise InputError(f"top_k: {losses.top_k} of a vocabulary of {vocabulary}", "use 0, which takes all of it")
    teacher: Teacher | None = None
    if losses.logits == "none":
        pass
    elif teacher_top_k is not None:
        stored = teacher_top_k.log_probs.shape[1]
        if not 1 <= losses.top_k <= stored:
            raise InputError(
                f"top_k: {losses.top_k} with a teacher of which the {stored} most likely tokens are known",
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

    student_hidden [N, d_s] and student_head [V, d_s] are differentiable; teacher_hidden [N, d_t] and teacher_head
    [V, d_t] are not. A head is its weight, or a `Head` made from it once, which soft-caps or scales if the model does.
    Otherwise as `linear_logit_loss`.
    """
    student = student_head if isinstance(student_head, Head) else Head(student_head)
    teacher = teacher_head if isinstance(teacher_head, Head) else Head(teacher_head)
    losses = Losses(temperature=temperature)
    return linear_logit_loss(student_hidden, student, losses, teacher_hidden=teacher_hidden, teacher_head=teacher).loss
