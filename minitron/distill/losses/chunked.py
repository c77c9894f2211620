"""The loss on logits by PyTorch's own operations, on any device and in any dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitron.distill.losses import Losses
from minitron.distill.losses.closed_form import ClosedForm, Teacher, results
from minitron.distill.losses.divergences import IGNORED, cross_entropy_, divergence, forward_kl_to_best_
from minitron.logits import Head, cache_blocks, cache_slices, tokens_per_chunk

CHUNK_TOKENS = {"cpu": 256, "cuda": 512}  # at most


class _Target(NamedTuple):
    """A teacher's distribution at n tokens: logits [n, V], with their log-sum-exp [n] if it is known, or the
    log-probabilities [n, k] of some `tokens` [n, k]."""

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
    """Of hidden states [N, d] and a head's weight [V, d]: the loss, the divergence of each token and the cross-entropy, as
    `LogitLoss` has them; `labels` int64 [N], or None."""

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
            target = None if teacher is None else _target(teacher, part, losses.top_k, other_space)
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
        return results(ctx, losses, soft, hard, max(1, labelled))


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
