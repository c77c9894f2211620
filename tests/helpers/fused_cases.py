"""Print the errors of the fused logit loss compared with float64, for every kind of loss, as JSON.

    python -m helpers.fused_cases     on the GPU, or on a CPU with TRITON_INTERPRET=1

Everything is float32, because Triton's interpreter rounds to bfloat16 differently from a GPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from itertools import product

VOCABULARY, WIDTH, TEACHER_WIDTH = 301, 24, 40
BLOCK = 128  # the vocabulary needs three blocks, of which the last is not full


@dataclass(frozen=True)
class Case:
    losses: dict = field(default_factory=dict)
    softcap: float = 0.0
    scale: float = 1.0
    tokens: int = 5
    close: bool = False
    """Whether the student's hidden states almost equal the teacher's."""
    known: bool = False
    """Whether the log-sum-exp of the teacher's logits is given."""
    stored: int = 0
    """Number of top-k tokens that are stored instead of the teacher's hidden states; 0 for hidden states."""


DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "mse", "cosine")


def _cases():
    for logits, k in [*((name, 0) for name in DIVERGENCES), ("forward_kl", 5)]:
        for temperature, cross_entropy, softcap in product((1.0, 2.5), (0.0, 0.7), (0.0, 4.0)):
            losses = {"logits": logits, "temperature": temperature, "cross_entropy": cross_entropy, "top_k": k}
            name = f"{logits} top {k}" if k else logits
            name += f" T {temperature}" + " labels" * bool(cross_entropy) + " soft-capped" * bool(softcap)
            yield name, Case(losses, softcap=softcap, scale=0.5 if softcap else 1.0)
    for logits in DIVERGENCES:
        yield f"{logits} of a close student", Case({"logits": logits}, close=True)
    for k in (1, VOCABULARY):
        yield f"forward_kl top {k} of {VOCABULARY}", Case({"top_k": k})
    yield "stored top 7 of 9", Case({"top_k": 7, "temperature": 1.5, "cross_entropy": 0.3}, stored=9)
    yield "labels alone", Case({"logits": "none", "cross_entropy": 1.0}, scale=0.25)
    yield "known log-sum-exp", Case({"cross_entropy": 0.5}, known=True)
    whole = {"temperature": 2, "cross_entropy": 1}
    yield "whole numbers", Case(whole)
    yield "whole numbers, top 5", Case({**whole, "top_k": 5})
    yield "chunks and parts", Case({"cross_entropy": 0.5}, tokens=75)


CASES = dict(_cases())


def errors(case, device):
    """Relative errors |x - x64| / |x64| of the losses and gradients of a case, by name."""
    import torch
    from helpers.loss_reference import dense, reference

    from minitron.distill import Losses, linear_logit_loss
    from minitron.distill.teacher.live import TopK
    from minitron.logits import Head

    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=draw).to(device)

    losses = Losses(**case.losses)
    ht, wt = random(case.tokens, TEACHER_WIDTH), 0.3 * random(VOCABULARY, TEACHER_WIDTH)
    hs, ws = random(case.tokens, WIDTH), random(VOCABULARY, WIDTH)
    if case.close:
        hs, ws = ht + 1e-3 * random(*ht.shape), wt.clone()
    labels = torch.randint(0, VOCABULARY, (case.tokens,), generator=draw).to(device)
    labels[::3] = -100
    hs.requires_grad_()
    ws.requires_grad_()
    student, other = (Head(weight, softcap=case.softcap, scale=case.scale) for weight in (ws, wt))
    teacher = {"teacher_hidden": ht, "teacher_head": other}
    if case.known:
        teacher["teacher_log_sum_exp"] = dense(ht, other).logsumexp(-1).float()
    if case.stored:
        teacher = {"teacher_top_k": TopK(*dense(ht, other).log_softmax(-1).float().topk(case.stored))}
    actual = linear_logit_loss(hs, student, losses, labels=labels, **teacher)
    expected, each = reference(hs, student, ht, other, losses, labels)
    found = {"loss": (actual.loss, expected), "divergence": (actual.divergence, each)}
    if losses.cross_entropy:
        alone = replace(losses, logits="none", cross_entropy=1.0, top_k=0)
        found["cross_entropy"] = actual.cross_entropy, reference(hs, student, ht, other, alone, labels)[0]
    ours, exact = (torch.autograd.grad(3 * loss, [hs, ws]) for loss in (actual.loss, expected))
    found["hidden_grad"], found["head_grad"] = zip(ours, exact, strict=True)
    return {name: _error(*pair) for name, pair in found.items()}


def _error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def main():
    import torch

    from minitron.distill.losses import fused

    fused.available = lambda weight: True
    fused.BLOCK, fused.WARPS = BLOCK, 4
    fused.CHUNK_TOKENS, fused.GRADIENT_TOKENS = 16, 48
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps({name: errors(case, device) for name, case in CASES.items()}))


if __name__ == "__main__":
    main()
