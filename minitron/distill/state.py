"""Training state: master weights and the optimizer's moments."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minitron.distill.config import DistillConfig


class TrainingState:
    """float32 master weights and AdamW behind a working model of any dtype; sharded parameters are their own masters."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], config: DistillConfig) -> None:
        self.config = config
        self.named = named
        self.masters = [p if isinstance(p, DTensor) else p.detach().float().clone() for _, p in self.named]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        for master in self.masters:
            self.optimizer.state[master] = {
                "step": torch.zeros((), device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def accumulate(self) -> None:
        """Move the gradients of a micro-batch from the working weights to the master weights, in float32."""
        for master, (_, parameter) in zip(self.masters, self.named, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
                parameter.grad = None

    def reduce(self, parts: Tensor) -> tuple[Tensor, float]:
        """Sum the losses and gradients over the processes and clip; returns the sum of the losses and the norm before."""
        for master in self.masters:
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad
        if dist.is_initialized() and dist.get_world_size() > 1:
            gradients = [master.grad for master in self.masters if not isinstance(master, DTensor)]
            pending = [dist.all_reduce(tensor, async_op=True) for tensor in (parts, *gradients)]
            for work in pending:
                work.wait()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.config.clip_norm, foreach=True)
        return parts, float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def update(self, rate: float) -> None:
        """Step at this learning rate and round the new weights into the working model."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._round()

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _round(self) -> None:
        for master, (_, parameter) in zip(self.masters, self.named, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, float32, the tensors themselves."""
        tensors: dict[str, Tensor] = {}
        for master, (name, _) in zip(self.masters, self.named, strict=True):
            moments = self.optimizer.state[master]
            tensors |= {
                f"master.{name}": master.detach(),
                f"exp_avg.{name}": moments["exp_avg"],
                f"exp_avg_sq.{name}": moments["exp_avg_sq"],
            }
        return tensors

    def restored(self, updates: int) -> None:
        """Go on with what was read into `tensors`, the state after that many updates."""
        for master in self.masters:
            self.optimizer.state[master]["step"].fill_(float(updates))
        self._round()
