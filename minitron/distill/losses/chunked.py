"""The loss on logits in PyTorch operations, for any device and dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitron.distill.losses import Losses
from minitron.distill.losses.closed_form import ClosedForm, Teacher, results
from minitron.distill.losses.divergences import IGNORED, cross_entropy_, divergence, forward_kl_to_tokens_
from minitron.logits import Head, cache_blocks, cache_slices, tokens_per_chunk

CHUNK_TOKENS = {"cpu": 256, "cuda": 512}  # largest number of tokens in a chunk


class _Target(NamedTuple):
    """A teacher's distributions at n tokens: logits [n, V], optionally with their log-sum-exp [n]; or log-probabilities
    [n, k] of `tokens` [n, k]."""

    values: Tensor
    log_sum_exp: Tensor | None = None
    tokens: Tensor | None = None

    def rows(self, rows: slice) -> _Target:
        known, tokens = (None if tensor is None else tensor[rows] for tensor in self[1:])
        return _Target(self.values[rows], known, tokens)


def _target(teacher: Teacher, part: slice, top_k: int, out: Tensor | None) -> _Target:
    if teacher.top is not None:
        return _Target(teacher.top.log_probs[part, :top_k].float(), tokens=teacher.top.tokens[part, :top_k].long())
    assert teacher.hidden is not None
    assert teacher.head is not None
    known = None if teacher.log_sum_exp is None else teacher.log_sum_exp[part]
    return _Target(teacher.head.logits(teacher.hidden[part], out), known)


class ChunkedLogitLoss(ClosedForm):
    """(loss, divergence of each token, cross-entropy), as in `LogitLoss`, from hidden states [N, d] and a head's weight [V, d];
    labels: int64 [N] or None."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        student: Head,
        losses: Losses,
        teacher: Teacher | None,
        labels: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = hidden.shape[0]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty(hidden.shape, dtype=weight.dtype, device=hidden.device) if need_hidden else None
        weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        divergences = torch.zeros(tokens, dtype=torch.float32, device=hidden.device)
        cross_entropies = torch.zeros_like(divergences)
        # one buffer for all chunks: the allocator returns blocks of this size to the system, and allocating them again is slow
        chunk = tokens_per_chunk(weight, CHUNK_TOKENS[weight.device.type])
        shape = min(tokens, chunk), len(weight)
        student_buffer = torch.empty(shape, device=weight.device)
        teacher_buffer = torch.empty(shape, device=weight.device) if teacher is not None and teacher.head else None
        rounded = _gradient_buffer(student_buffer, teacher_buffer, weight.dtype)
        # on the device, since the host would wait for it
        labelled: Tensor | int = 1 if labels is None else (labels != IGNORED).sum().clamp(min=1)
        label_weight = torch.full((), losses.cross_entropy, dtype=torch.float64, device=hidden.device) / labelled
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            target = None if teacher is None else _target(teacher, part, losses.top_k, teacher_buffer)
            logits = student.logits(hidden[part], student_buffer)
            gradient = rounded[: len(logits)]
            for rows in cache_slices(logits):
                slope = student.slope(logits[rows])
                own = None
                if labels is not None:
                    own = logits[rows].clone() if target is not None else logits[rows]
                    cross_entropies[part][rows] = cross_entropy_(own, labels[part][rows])
                    own.mul_(label_weight)
                if target is not None:
                    divergences[part][rows] = _divergence_(logits[rows], target.rows(rows), losses, tokens)
                    if own is not None:
                        logits[rows] += own
                if isinstance(slope, Tensor) or slope != 1.0:
                    logits[rows] *= slope
                if rounded is not student_buffer:
                    # p_s - p_t is computed in float32 and rounded once, to the dtype of the products' operands
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
        return results(ctx, losses, divergences, cross_entropies, labelled)


def _gradient_buffer(student: Tensor, teacher: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A buffer [n, V] in `dtype` for the gradient of a chunk's logits.

    student, teacher: the buffers of the logits, float32 [n, V]. For float32 the gradient stays in the student's. For a 16-bit
    dtype it uses the first half of the teacher's, whose rows are no longer needed when they are overwritten.
    """
    if dtype == student.dtype:
        return student
    if teacher is None or dtype.itemsize != 2:
        return torch.empty(student.shape, dtype=dtype, device=student.device)
    return teacher.view(dtype).flatten()[: student.numel()].view(student.shape)


def _divergence_(student: Tensor, target: _Target, losses: Losses, tokens: int) -> Tensor:
    """T² · D of each token, float32 [n]; the student's logits are overwritten with its gradient divided by `tokens`."""
    temperature = losses.temperature
    teacher = target.values
    if temperature != 1.0:
        student.div_(temperature)
        teacher.div_(temperature)
    if target.tokens is not None:
        loss = forward_kl_to_tokens_(student, teacher, target.tokens)
    else:
        loss = divergence(losses.logits, losses.top_k)(student, teacher, target.log_sum_exp)
    student.mul_(temperature / tokens)
    return loss.mul_(temperature**2) if temperature != 1.0 else loss
