"""Training state: master weights, the sums of gradients and the optimizer's moments."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from minitron.device import values_of
from minitron.distill.config import ADAMW_8BIT, ADAMW_OFFLOAD, DistillConfig
from minitron.distill.low_bit import adamw_8bit, moment_parts
from minitron.distill.offload import OffloadedStep, sliced
from minitron.sharded_tensors import own_part, whole


class TrainingState:
    """float32 master weights and AdamW behind a working model of any dtype; sharded parameters are their own masters.

    Inside the context a gradient moves from the working weight to the float32 sums as soon as the backward pass has made it:
    the gradients of the whole model never exist in the working dtype beside the sums. With the optimizer "adamw-offload"
    masters and moments are in main memory and are updated there (see `OffloadedStep`).
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], config: DistillConfig) -> None:
        self.config = config
        self.named = named
        self.offloaded: OffloadedStep | None = None
        self.masters = [p if isinstance(p, DTensor) else self._master(p) for _, p in named]
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == ADAMW_8BIT:
            self.optimizer = adamw_8bit(self.masters, config.betas, config.weight_decay)
            self._moments: Mapping[Tensor, Any] = self.optimizer.state
        else:
            updated = [(master, torch.zeros_like(master), torch.zeros_like(master)) for master in self.masters]
            self._moments = {master: {"exp_avg": first, "exp_avg_sq": second} for master, first, second in updated}
            if config.optimizer == ADAMW_OFFLOAD:
                parameters = [parameter for _, parameter in named]
                self.optimizer = _adamw(sliced(updated, parameters), config)
                self.offloaded = OffloadedStep(parameters, self.optimizer)
            else:
                self.optimizer = _adamw(updated, config)
        self._sums: list[Tensor | None] = [None] * len(named)  # float32, on the devices of the working weights
        self._kept: list[Tensor] = []

    def _master(self, parameter: nn.Parameter) -> Tensor:
        weight = parameter.detach()
        if self.config.optimizer == ADAMW_OFFLOAD:
            return weight.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
        return weight.to(torch.float32, copy=True)

    def __enter__(self) -> TrainingState:
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._add, index))
            for index, (_, parameter) in enumerate(self.named)
            if not isinstance(parameter, DTensor)  # FSDP reduces those in float32 itself
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def keep_sums(self) -> None:
        """Keep the sums of the gradients where they are from step to step, as CUDA graphs that add to them need."""
        self._kept = [torch.zeros_like(parameter, dtype=torch.float32) for _, parameter in self.named]
        self._sums = [*self._kept]

    def _add(self, index: int, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        total = self._sums[index]
        self._sums[index] = gradient.float() if total is None else total.add_(gradient)

    def reduce(self, parts: Tensor) -> tuple[list[float], float]:
        """Sum the losses, float64, and the gradients over the processes, and clip. Returns the sums of the losses and the norm
        before: the only values for which the host waits in a step."""
        gradients = [self._gradient(index) for index in range(len(self.named))]
        if dist.is_initialized() and dist.get_world_size() > 1:
            plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
            pending = [dist.all_reduce(tensor, async_op=True) for tensor in (parts, *plain)]
            for work in pending:
                work.wait()
        norm = whole(get_total_norm(gradients, foreach=True))
        scale = (self.config.clip_norm / (norm + 1e-6)).clamp(
            max=1.0
        )  # as clip_grad_norm_, for gradients of no parameter
        local = [own_part(gradient) for gradient in gradients]
        torch._foreach_mul_(local, scale)  # a small model on a GPU waits for each kernel to be launched
        *summed, before = values_of(torch.cat([parts, norm.double().view(1)]))
        return summed, before

    def _gradient(self, index: int) -> Tensor:
        """The sum of a parameter's gradients, zero where there were none."""
        parameter = self.named[index][1]
        if isinstance(parameter, DTensor):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            return parameter.grad
        total = self._sums[index]
        self._sums[index] = total = torch.zeros_like(parameter, dtype=torch.float32) if total is None else total
        return total

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """Step with the reduced gradients at this learning rate, and round the new weights into the working model."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # torchao's
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if self.offloaded:
            self.offloaded.update(self._sums)
            return
        for index, (master, total) in enumerate(zip(self.masters, self._sums, strict=True)):
            if total is not None:
                master.grad, self._sums[index] = total, None
        self.optimizer.step()
        for master in self.masters:
            master.grad = None
        self._round()

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self._sums = [*self._kept] or [None] * len(self.named)
        if self._kept:
            torch._foreach_zero_(self._kept)

    @torch.no_grad()
    def _round(self) -> None:
        own = [(parameter, master) for (_, parameter), master in zip(self.named, self.masters, strict=True)]
        working = [parameter.detach() for parameter, master in own if master is not parameter]
        if working:
            torch._foreach_copy_(working, [master for parameter, master in own if master is not parameter])

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, the tensors themselves: float32, and the codes of moments of 8 bits."""
        tensors: dict[str, Tensor] = {}
        for master, (name, _) in zip(self.masters, self.named, strict=True):
            moments = self._moments[master]
            tensors[f"master.{name}"] = master.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors |= {f"{moment}.{name}{part}": tensor for part, tensor in moment_parts(moments[moment])}
        return tensors

    def restored(self, updates: int) -> None:
        """Go on with what was read into `tensors`, the state after that many updates."""
        for state in self.optimizer.state.values():
            state["step"].fill_(float(updates))
        if self.offloaded:
            self.offloaded.round()
        else:
            self._round()


def _adamw(updated: list[tuple[Tensor, Tensor, Tensor]], config: DistillConfig) -> torch.optim.AdamW:
    """The optimizer of masters, or parts of them, with these two moments."""
    optimizer = torch.optim.AdamW(
        [master for master, _, _ in updated],
        lr=0.0,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    for master, first, second in updated:
        step = torch.zeros((), device=master.device)
        optimizer.state[master] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    return optimizer
