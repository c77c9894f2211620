"""Implementations of the logit loss of a distillation and its gradient: ours, a plain one, and those of other packages.

Each is called with student hidden states [N, d_s] and head [V, d_s], which need a gradient, and the teacher's [N, d_t] and
[V, d_t], and returns forward KL at temperature 1, a mean over the tokens (or that plus a constant), to call `backward` on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from minitron.distill import Losses, linear_logit_loss
from minitron.logits import Head

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

REFERENCE = "dense, float32 upcast"
OURS = "minitron"


def ours(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
    """The teacher's head is prepared once per training, the student's for every batch."""
    return linear_logit_loss(hs, Head(ws), Losses(), teacher_hidden=ht, teacher_head=_teacher_head(wt)).loss


@cache
def _teacher_head(weight: Tensor) -> Head:
    return Head(weight)


def dense(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
    """Logits in the operands' dtype, then everything in float32."""
    teacher = (ht @ wt.T).float().log_softmax(-1)
    student = (hs @ ws.T).float().log_softmax(-1)
    return functional.kl_div(student, teacher, log_target=True, reduction="batchmean")


def products(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, *, exact: bool) -> None:
    """The matrix products of such a loss alone: a lower bound on the time of every loss that computes them.

    The logits of both models, accumulated in float32 with `exact` and otherwise in the operands' dtype, and the gradients
    of the student's hidden states and head: all 256 tokens at a time, or on a GPU logits of 1,024 and gradients of all.
    """
    chunk, size = (1024, len(hs)) if hs.is_cuda else (256, 256)
    gradient = torch.zeros(size, len(ws), dtype=ws.dtype, device=ws.device)
    logits = torch.empty(chunk, len(ws), dtype=torch.float32 if exact else ws.dtype, device=ws.device)
    hidden_grad, head_grad = torch.empty_like(hs), torch.empty_like(ws)
    for start in range(0, len(hs), size):
        part = slice(start, start + size)
        for of_student, of_teacher in zip(hs[part].split(chunk), ht[part].split(chunk), strict=True):
            for hidden, weight in ((of_student, ws), (of_teacher, wt)):
                if exact:
                    Head(weight).logits(hidden, logits)
                else:
                    torch.mm(hidden, weight.T, out=logits[: len(hidden)])
        torch.mm(gradient[: len(hs[part])], ws, out=hidden_grad[part])
        torch.mm(gradient[: len(hs[part])].T, hs[part], out=head_grad)


def products_flops(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor) -> int:
    """Floating-point operations of `products`."""
    return 2 * len(hs) * (3 * ws.numel() + wt.numel())


def _trl_dense() -> Loss:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    def loss(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = (ht @ wt.T)[None]
        labels = torch.zeros(1, len(hs), dtype=torch.int64, device=hs.device)
        return GKDTrainer.generalized_jsd_loss((hs @ ws.T)[None], teacher, labels=labels, beta=0)

    return loss


def _trl_chunked() -> Loss:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        mask = torch.ones(1, len(hs), dtype=torch.int64, device=hs.device)
        return _chunked_divergence_loss(hs[None], ht[None], ws, wt, mask, beta=0.0)[0]

    return loss


def _liger(compiled: bool) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    made = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)

    def loss(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        return made(hs, ws, ht, wt, torch.zeros(len(hs), dtype=torch.int64, device=hs.device))

    return loss


def _torchtune() -> Loss:
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss

    made = ForwardKLWithChunkedOutputLoss()

    def loss(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        chunks = made.num_output_chunks
        with torch.no_grad():
            teacher = [part @ wt.T for part in ht[None].chunk(chunks, dim=1)]
        student = [part @ ws.T for part in hs[None].chunk(chunks, dim=1)]
        return made(student, teacher, torch.zeros(1, len(hs), dtype=torch.int64, device=hs.device))

    return loss


def _modelopt() -> Loss:
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    made = LogitsDistillationLoss(reduction="none")

    def loss(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = (ht @ wt.T).float()  # as in its trainer for transformers
        return made((hs @ ws.T).float(), teacher).mean()

    return loss


PEERS: dict[str, tuple[str, Callable[[], Loss]]] = {
    "TRL, GKD": ("trl", _trl_dense),
    "TRL, chunked": ("trl", _trl_chunked),
    "Liger, chunked": ("liger-kernel", lambda: _liger(compiled=False)),
    "Liger, chunked, compiled": ("liger-kernel", lambda: _liger(compiled=True)),
    "torchtune, chunked": ("torchtune", _torchtune),
    "ModelOpt": ("nvidia-modelopt", _modelopt),
}


def contenders(say: Callable[[str], Any] = print) -> dict[str, Loss]:
    """The implementations that can run here, by name; prints which packages are missing."""
    losses: dict[str, Loss] = {OURS: ours, REFERENCE: dense}
    for name, (package, make) in PEERS.items():
        try:
            losses[name] = make()
            say(f"{name}: {package} {version(package)}")
        except ImportError as error:
            say(f"{name}: left out, {package} is not completely installed ({error})")
    return losses


def contender(name: str) -> Loss:
    """One implementation, without imports for the others."""
    return {OURS: ours, REFERENCE: dense}.get(name) or PEERS[name][1]()
