"""Distillation on one process or many. A step is a pure function of weights, optimizer state and the step's number, so an
interrupted run continues as if nothing had happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitron.data import Rows, rows_for_step
from minitron.distill.checkpoint import load_checkpoint, save_checkpoint
from minitron.distill.losses import Losses
from minitron.distill.objective import Objective
from minitron.distill.schedule import learning_rate
from minitron.distill.teacher import Targets
from minitron.errors import InputError, NonFiniteError


@dataclass(frozen=True)
class DistillConfig:
    """How long and how fast. `batch_rows` is the global batch, the same at any number of processes."""

    steps: int
    batch_rows: int
    peak_lr: float
    min_lr: float
    warmup_steps: int
    micro_batch_rows: int = 4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    seed: int = 0
    checkpoint_every: int = 0  # steps; 0 for none
    report_every: int = 1  # steps


@dataclass(frozen=True)
class StepReport:
    """What a step did. `loss` is the whole objective on the step's rows; its parts are None where they are not used."""

    step: int
    steps: int
    loss: float
    kl: float | None
    """The divergence from the teacher that `Losses.logits` names, by default forward KL, nats per token."""
    cross_entropy: float | None
    """Nats per token, before its weight."""
    intermediate: float | None
    """L_is, before its weight."""
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float


def distill(
    student: nn.Module,
    targets: Targets | None,
    rows: Rows,
    config: DistillConfig,
    *,
    losses: Losses = Losses(),  # noqa: B008 (frozen)
    channels: Tensor | None = None,
    checkpoints: str | None = None,
    key: str = "",
    report: Callable[[StepReport], None] | None = None,
    until: int | None = None,
) -> nn.Module:
    """Train `student` in place to match the teacher on `rows`, by default its next-token distribution by forward KL alone.

    Only parameters that require a gradient are trained; working weights keep the student's dtype, master weights and
    AdamW's moments are float32. `channels`, int64 [hidden_size], are the teacher's channels that the student kept; the
    intermediate losses start from them. With torch.distributed initialised every process takes its share of each global
    batch and the gradients are summed. With `checkpoints`, the state is saved there every `checkpoint_every` steps and the
    newest good one under `key` is resumed. With `until`, stops after that step of the same schedule and saves it, so that
    a later call goes on from there.
    Raises InputError for targets that do not suffice for `losses`, and NonFiniteError, naming the step and its rows, when
    the loss or the gradient is not finite.
    """
    if until is not None and not checkpoints:
        raise InputError(f"until: {until} without checkpoints", "say where the state at that step is to be saved")
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    objective = Objective(student, targets, losses, channels)
    state = _State(objective.named_parameters(), config)
    first = state.resume(checkpoints, key) if checkpoints else 0
    student.train()
    clock, clock_tokens = time.perf_counter(), 0
    for step in range(first, config.steps if until is None else min(until, config.steps)):
        indices = rows_for_step(len(rows), config.batch_rows, step, config.seed)
        if objective.targets:
            following = rows_for_step(len(rows), config.batch_rows, step + 1, config.seed)
            objective.targets.prefetch([*indices[rank::world], *following[rank::world]])
        share = _forward_backward(objective, rows, indices[rank::world], config)
        rate = learning_rate(
            step,
            total_steps=config.steps,
            peak=config.peak_lr,
            minimum=config.min_lr,
            warmup_steps=config.warmup_steps,
        )
        parts, norm = state.update(share, rate, world, where=f"step {step}, rows {indices}")
        clock_tokens += len(indices) * rows.seq_length
        done = step + 1
        if report and (done % config.report_every == 0 or done == config.steps):
            elapsed = time.perf_counter() - clock
            tokens = done * config.batch_rows * rows.seq_length
            loss, kl, cross_entropy, intermediate = parts.tolist()
            report(
                StepReport(
                    step=done,
                    steps=config.steps,
                    loss=loss,
                    kl=None if losses.logits == "none" else kl,
                    cross_entropy=cross_entropy if losses.cross_entropy else None,
                    intermediate=intermediate if losses.needs_live_teacher else None,
                    learning_rate=rate,
                    grad_norm=norm,
                    tokens=tokens,
                    tokens_per_second=clock_tokens / elapsed,
                )
            )
            clock, clock_tokens = time.perf_counter(), 0
        regular = config.checkpoint_every and done % config.checkpoint_every == 0 and done < config.steps
        if checkpoints and (regular or done == until):
            if rank == 0:
                save_checkpoint(checkpoints, done, state.tensors(), key=key)
            if world > 1:
                dist.barrier()
    return student.eval()


def _forward_backward(objective: Objective, rows: Rows, indices: Sequence[int], config: DistillConfig) -> Tensor:
    """Gradients of this process's share of the global mean loss, left on the parameters; returns that share of each part."""
    device = next(objective.student.parameters()).device
    total = torch.zeros(4, dtype=torch.float64, device=device)
    for start in range(0, len(indices), config.micro_batch_rows):
        part = indices[start : start + config.micro_batch_rows]
        loss, values = objective(part, rows.take(part).to(device))
        share = len(part) / config.batch_rows
        (loss * share).backward()
        total += values * share
    return total


class _State:
    """float32 master weights and AdamW behind a working model of any dtype."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], config: DistillConfig) -> None:
        self.config = config
        self.named = named
        self.masters = [p.detach().float().clone() for _, p in self.named]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    def update(self, parts: Tensor, rate: float, world: int, where: str) -> tuple[Tensor, float]:
        """Sum over processes, clip, step, and round the new weights into the model; returns (parts, gradient norm)."""
        for master, (_, parameter) in zip(self.masters, self.named, strict=True):
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        if world > 1:
            pending = [dist.all_reduce(tensor, async_op=True) for tensor in (parts, *self._gradients())]
            for work in pending:
                work.wait()
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self.config.clip_norm, foreach=True))
        if not torch.isfinite(parts[0]) or not torch.isfinite(torch.tensor(norm)):
            raise NonFiniteError(
                f"loss {float(parts[0])} and gradient norm {norm} at {where}",
                "lower the learning rate, or look at those rows of the data",
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._round()
        return parts, norm

    def _gradients(self) -> Iterator[Tensor]:
        for master in self.masters:
            assert master.grad is not None
            yield master.grad

    @torch.no_grad()
    def _round(self) -> None:
        for master, (_, parameter) in zip(self.masters, self.named, strict=True):
            parameter.copy_(master)

    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for master, (name, _) in zip(self.masters, self.named, strict=True):
            moments = self.optimizer.state[master]
            tensors |= {
                f"master.{name}": master,
                f"exp_avg.{name}": moments["exp_avg"],
                f"exp_avg_sq.{name}": moments["exp_avg_sq"],
            }
        return tensors

    def resume(self, folder: str, key: str) -> int:
        """Load the newest good checkpoint; the number of steps done."""
        found = load_checkpoint(folder, key=key)
        if found is None:
            return 0
        step, tensors = found
        for master, (name, _) in zip(self.masters, self.named, strict=True):
            master.copy_(tensors[f"master.{name}"])
            self.optimizer.state[master] = {
                "step": torch.tensor(float(step), device=master.device),
                "exp_avg": tensors[f"exp_avg.{name}"].to(master.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(master.device),
            }
        self._round()
        return step
