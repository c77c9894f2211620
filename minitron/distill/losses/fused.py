"""The loss on logits on CUDA: matrix products by cuBLAS, and one Triton kernel between them.

Logits exist for one chunk of tokens at a time, in float32. Their gradient is kept in bfloat16 for several chunks, up to
GRADIENT_BYTES, so that its two matrix products are large and the head's gradient is not written once per chunk.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitron.distill.losses import Losses
from minitron.distill.losses.closed_form import ClosedForm, Teacher, results
from minitron.distill.losses.divergences import IGNORED
from minitron.logits import CACHE_ROWS, Head, log_softmax_, most_tokens

CHUNK_TOKENS = 1024  # largest number of tokens whose logits exist at a time
GRADIENT_TOKENS = 8192  # largest number of tokens whose gradient is kept; more would not make the products faster
GRADIENT_BYTES = 2 << 30
BLOCK = 4096  # number of logits of a row that a kernel program reads at a time
WARPS = 16  # per kernel program


def available(weight: Tensor) -> bool:
    """Whether `FusedLogitLoss` supports a head [V, d]: bfloat16, on CUDA, with Triton installed (part of torch on Linux).

    float16 is not supported because the gradient of a single logit is below its range.
    """
    return weight.is_cuda and weight.dtype == torch.bfloat16 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


class FusedLogitLoss(ClosedForm):
    """The same inputs and outputs as `ChunkedLogitLoss`."""

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
        tokens = len(hidden)
        inputs = hidden.to(weight.dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(inputs) if need_hidden else None
        weight_grad: Tensor | None = None
        logits = _Logits(inputs, student, losses, teacher, labels)
        size = gradient_tokens(tokens, len(weight))
        gradient = space = weight.new_empty(min(tokens, size), len(weight))
        for start in range(0, tokens, size):
            part = slice(start, start + size)
            gradient = logits.write_gradient(part, space)
            if hidden_grad is not None:
                torch.mm(gradient, weight, out=hidden_grad[part])
            if need_weight:
                weight_grad = _plus_product(weight_grad, gradient, inputs[part], alone=size >= tokens)
        del space, gradient, logits.own, logits.other  # before the head's gradient is rounded into memory of its own
        ctx.gradients = (
            None if hidden_grad is None else hidden_grad.to(hidden.dtype),
            None if weight_grad is None else weight_grad.to(weight.dtype),
        )
        return results(ctx, losses, logits.divergence, logits.cross_entropies, logits.labelled)


def gradient_tokens(tokens: int, vocabulary: int) -> int:
    """Number of tokens whose gradient of logits is kept at a time; divides the tokens into parts of about equal size."""
    most = min(GRADIENT_TOKENS, GRADIENT_BYTES // (2 * vocabulary))
    parts = max(1, -(-tokens // max(CACHE_ROWS, most)))
    return CACHE_ROWS * max(1, -(-tokens // (CACHE_ROWS * parts)))


def _plus_product(total: Tensor | None, gradient: Tensor, inputs: Tensor, alone: bool) -> Tensor:
    """total + gradientᵀ · inputs, [V, d] in float32; of a single part (`alone`), in the operands' dtype."""
    wide: dict[str, Any] = {} if alone or inputs.dtype == torch.float32 else {"out_dtype": torch.float32}
    if total is None:
        return torch.mm(gradient.T, inputs, **wide)
    return torch.addmm(total, gradient.T, inputs, out=total, **wide)


class _Target(NamedTuple):
    """The teacher's values for n tokens that the kernel reads: products of hidden states and head [n, V] and the log-sum-exp of
    their logits [n], if it is known; or the log-probabilities [n, k] of the top-k `tokens` [n, k]."""

    products: Tensor | None = None
    log_sum_exp: Tensor | None = None
    log_probs: Tensor | None = None
    tokens: Tensor | None = None


class _Logits:
    """The logits of N hidden states of the student and its teacher, one chunk at a time, and the losses and gradients that the
    kernel computes from them."""

    def __init__(
        self, hidden: Tensor, student: Head, losses: Losses, teacher: Teacher | None, labels: Tensor | None
    ) -> None:
        tokens = len(hidden)
        vocabulary = len(student.weight)
        self.hidden = hidden
        self.student = student
        self.losses = losses
        self.teacher = teacher
        self.labels = None if labels is None else labels.contiguous()
        self.divergence = torch.zeros(tokens, device=hidden.device)
        self.cross_entropies = torch.zeros_like(self.divergence)
        self.labelled: Tensor | int = 1 if labels is None else (labels != IGNORED).sum().clamp(min=1)
        self.label_weight = torch.full((1,), losses.cross_entropy, device=hidden.device).div_(self.labelled)
        self.chunk = most_tokens(vocabulary, "cuda", CHUNK_TOKENS)
        self.own = torch.empty(min(tokens, self.chunk), vocabulary, device=hidden.device)
        self.other = torch.empty_like(self.own) if teacher is not None and teacher.head is not None else None

    def write_gradient(self, part: slice, space: Tensor) -> Tensor:
        """The gradient of the products of a `part` of the tokens, in the first rows of `space`; stores these tokens' losses."""
        start = part.start
        stop = min(part.stop, len(self.hidden))
        for first in range(start, stop, self.chunk):
            rows = slice(first, min(first + self.chunk, stop))
            self._run_kernel(rows, space[first - start : rows.stop - start])
        return space[: stop - start]

    def _target(self, rows: slice) -> _Target:
        teacher = self.teacher
        k = self.losses.top_k
        if teacher is None:
            return _Target()
        if teacher.top is not None:
            values = teacher.top.log_probs[rows, :k].float()
            tokens = teacher.top.tokens[rows, :k].contiguous()
        else:
            assert teacher.hidden is not None
            assert teacher.head is not None
            if not k:
                known = None if teacher.log_sum_exp is None else teacher.log_sum_exp[rows].contiguous()
                return _Target(teacher.head.products(teacher.hidden[rows], self.other), known)
            values, tokens = teacher.head.logits(teacher.hidden[rows], self.other).topk(k)
        return _Target(log_probs=log_softmax_((values / self.losses.temperature).contiguous()), tokens=tokens)

    def _run_kernel(self, rows: slice, gradient: Tensor) -> None:
        from minitron.distill.losses.kernels import logit_loss

        student = self.student
        losses = self.losses
        target = self._target(rows)
        divergence = "none" if self.teacher is None else "top_k" if losses.top_k else losses.logits
        teacher = student if self.teacher is None or self.teacher.head is None else self.teacher.head
        count, vocabulary = gradient.shape
        best = 1 if target.tokens is None else target.tokens.shape[1]
        with torch.cuda.device_of(gradient):
            logit_loss[(count,)](
                student.products(self.hidden[rows], self.own),
                target.products,
                target.log_sum_exp,
                target.log_probs,
                target.tokens,
                None if self.labels is None else self.labels[rows],
                self.label_weight,
                gradient,
                self.divergence[rows],
                self.cross_entropies[rows],
                count,
                vocabulary,
                best,
                losses.temperature,
                1.0 / len(self.hidden),
                student.scale,
                student.softcap or None,
                teacher.scale,
                teacher.softcap or None,
                DIVERGENCE=divergence,
                TEMPERED=losses.temperature != 1.0,
                BLOCK=BLOCK,
                BEST_BLOCK=min(BLOCK, 1 << (best - 1).bit_length()),
                num_warps=WARPS,
            )
