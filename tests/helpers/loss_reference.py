"""The logit losses by definition: in float64, with autograd, on full logits."""

from __future__ import annotations

import torch
from torch.nn import functional


def dense(hidden, head):
    """Logits float64 [N, V] of hidden states [N, d] and a `Head`."""
    logits = head.scale * hidden.double() @ head.weight.double().T
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits


def divergence(name, student, teacher):
    """Divergence float64 [N] between the softmax probabilities of logits [N, V]."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    middle = (p + q) / 2
    values = {
        "forward_kl": lambda: (p * (p / q).log()).sum(-1),
        "reverse_kl": lambda: (q * (q / p).log()).sum(-1),
        "jensen_shannon": lambda: ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2,
        "mse": lambda: (p - q).square().sum(-1),
        "cosine": lambda: 1 - functional.cosine_similarity(p, q, dim=-1),
    }
    return values[name]()


def reference(hs, student_head, ht, teacher_head, losses, labels=None):
    """The loss and the divergences [N] that `linear_logit_loss` should give."""
    student, teacher = dense(hs, student_head), dense(ht, teacher_head)
    total, each = 0.0, torch.zeros(len(hs), dtype=torch.float64, device=hs.device)
    if losses.logits != "none":
        scaled = teacher / losses.temperature
        if losses.top_k:
            worst = scaled.topk(losses.top_k).values[:, -1:]
            kept = scaled.masked_fill(scaled < worst, float("-inf")).log_softmax(-1)
            own = (student / losses.temperature).log_softmax(-1)
            each = functional.kl_div(own, kept, log_target=True, reduction="none").nan_to_num(0.0).sum(-1)
        else:
            each = divergence(losses.logits, student / losses.temperature, scaled)
        each = losses.temperature**2 * each
        total = each.mean()
    if losses.cross_entropy:
        total = total + losses.cross_entropy * functional.cross_entropy(student, labels)
    return total, each
