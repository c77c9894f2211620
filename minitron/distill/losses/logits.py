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

from minitron.distill.losses import Losses
from minitron.distill.losses.divergences import IGNORED, cross_entropy_, divergence, forward_kl_to_best_
from minitron.distill.teacher.live import TopK
from minitron.errors import InputError
from minitron.logits import Head, cache_blocks, cache_slices, tokens_per_chunk

CHUNK_TOKENS = {"cpu": 256, "cuda": 512}  # at most


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
    chunk's alone live at a time, float32 [256, V] for each side on CPUs, [512, V] on GPUs, and fewer tokens of vocabularies
    so large that these would take more than 128 MiB or 512 MiB. `backward` can be called once.
    Raises InputError for vocabularies that differ.
    Source: arXiv 2407.14679 section 2.4 (L_CLM + L_logits).
    """
    vocabulary = student_head.weight.shape[0]
    if losses.top_k > vocabulary:
        raise InputError(f"top_k: {losses.top_k} of a vocabulary of {vocabulary}", "use 0, which takes all of it")
    teacher: _Teacher | None = None
    if losses.logits == "none":
        pass
    elif teacher_top_k is not None:
        stored = teacher_top_k.log_probs.shape[1]
        if not 1 <= losses.top_k <= stored:
            raise InputError(
                f"top_k: {losses.top_k} with a teacher of which the {stored} most likely tokens are known",
                f"use logits: forward_kl with top_k: {stored}, or store its hidden states",
            )
        teacher = _Teacher(top=teacher_top_k)
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
        teacher = _Teacher(teacher_hidden, teacher_head, teacher_log_sum_exp if losses.temperature == 1.0 else None)
    if not losses.cross_entropy:
        labels = None
    elif labels is None:
        raise InputError(f"cross_entropy: {losses.cross_entropy} without labels", "give the next tokens, int64 [N]")
    return LogitLoss(
        *_LinearLogitLoss.apply(student_hidden, student_head.weight, student_head, losses, teacher, labels)
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


class _Target(NamedTuple):
    """A teacher's distribution at n tokens: logits [n, V], with their log-sum-exp [n] if it is known, or the
    log-probabilities [n, k] of some `tokens` [n, k]."""

    values: Tensor
    log_sum_exp: Tensor | None = None
    tokens: Tensor | None = None

    def rows(self, rows: slice) -> _Target:
        known, tokens = (None if tensor is None else tensor[rows] for tensor in self[1:])
        return _Target(self.values[rows], known, tokens)


class _Teacher(NamedTuple):
    """Hidden states and head, or the most likely tokens."""

    hidden: Tensor | None = None
    head: Head | None = None
    log_sum_exp: Tensor | None = None
    top: TopK | None = None

    def target(self, part: slice, top_k: int, out: Tensor | None) -> _Target:
        if self.top is not None:
            return _Target(self.top.log_probs[part, :top_k].float(), tokens=self.top.tokens[part, :top_k].long())
        assert self.hidden is not None
        assert self.head is not None
        known = None if self.log_sum_exp is None else self.log_sum_exp[part]
        return _Target(self.head.logits(self.hidden[part], out), known)


class _LinearLogitLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        student: Head,
        losses: Losses,
        teacher: _Teacher | None,
        labels: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = hidden.shape[0]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty(hidden.shape, dtype=weight.dtype, device=hidden.device) if need_hidden else None
        weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        soft = torch.zeros(tokens, dtype=torch.float32, device=hidden.device)
        hard = torch.zeros_like(soft)
        # kept for all chunks: memory of this size goes back to the system when it is freed, and is slow to come again
        chunk = tokens_per_chunk(weight, CHUNK_TOKENS[weight.device.type])
        shape = min(tokens, chunk), len(weight)
        own_space = torch.empty(shape, device=weight.device)
        other_space = torch.empty(shape, device=weight.device) if teacher is not None and teacher.head else None
        rounded = _space_of_gradient(own_space, other_space, weight.dtype)
        labelled = 0 if labels is None else max(1, int((labels != IGNORED).sum()))
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            target = None if teacher is None else teacher.target(part, losses.top_k, other_space)
            logits = student.logits(hidden[part], own_space)
            gradient = rounded[: len(logits)]
            for rows in cache_slices(logits):
                slope = student.slope(logits[rows])
                own = None
                if labels is not None:
                    own = logits[rows].clone() if target is not None else logits[rows]
                    hard[part][rows] = cross_entropy_(own, labels[part][rows])
                    own.mul_(losses.cross_entropy / labelled)
                if target is not None:
                    soft[part][rows] = _divergence_(logits[rows], target.rows(rows), losses, tokens)
                    if own is not None:
                        logits[rows] += own
                if isinstance(slope, Tensor) or slope != 1.0:
                    logits[rows] *= slope
                if rounded is not own_space:
                    # p_s - p_t in float32, then rounded once: the products lose no more than the operands' own precision
                    gradient[rows] = logits[rows]
            if hidden_grad is not None:
                torch.mm(gradient, weight, out=hidden_grad[part])
            if weight_grad is not None:
                inputs = hidden[part].to(weight.dtype)
                for block in cache_blocks(weight):
                    weight_grad[block] += torch.mm(gradient[:, block].T, inputs)
        ctx.gradients = (
            hidden_grad.to(hidden.dtype) if hidden_grad is not None else None,
            weight_grad.to(weight.dtype) if weight_grad is not None else None,
        )
        cross_entropy = hard.double().sum() / max(1, labelled)
        loss = soft.double().mean() + losses.cross_entropy * cross_entropy
        parts = soft, cross_entropy.float()
        ctx.mark_non_differentiable(*parts)
        ctx.set_materialize_grads(False)
        return loss.float(), *parts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_logit_loss: backward was called twice; its gradients are kept for one call only")
        ours, ctx.gradients = ctx.gradients, None
        scaled = (None if gradient is None else gradient.mul_(gradients[0].to(gradient.dtype)) for gradient in ours)
        return (*scaled, *(None,) * 4)


def _space_of_gradient(own: Tensor, other: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Where the gradient of a chunk's logits is rounded to `dtype` [n, V]: in the front half of the teacher's logits, which
    are spent row by row before it gets there; in memory of its own without them; not at all for float32."""
    if dtype == own.dtype:
        return own
    if other is None or dtype.itemsize != 2:
        return torch.empty(own.shape, dtype=dtype, device=own.device)
    return other.view(dtype).flatten()[: own.numel()].view(own.shape)


def _divergence_(student: Tensor, target: _Target, losses: Losses, tokens: int) -> Tensor:
    """T² · D of each token, float32 [n]; the student's logits become its gradient divided by the number of tokens."""
    temperature, teacher = losses.temperature, target.values
    if temperature != 1.0:
        student.div_(temperature)
        teacher.div_(temperature)
    if target.tokens is not None:
        loss = forward_kl_to_best_(student, teacher, target.tokens)
    else:
        loss = divergence(losses.logits, losses.top_k)(student, teacher, target.log_sum_exp)
    student.mul_(temperature / tokens)
    return loss.mul_(temperature**2) if temperature != 1.0 else loss
