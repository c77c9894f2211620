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
from minitron.distill.loss import linear_kl_div
from minitron.distill.schedule import learning_rate
from minitron.distill.teacher import Targets
from minitron.errors import NonFiniteError
from minitron.logits import Head
from minitron.models import final_hidden, head_of


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
    temperature: float = 1.0
    seed: int = 0
    checkpoint_every: int = 0  # steps; 0 for none
    report_every: int = 1  # steps


@dataclass(frozen=True)
class StepReport:
    """What a step did. `loss` is the mean KL to the teacher on the step's rows, nats per token."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float


def distill(
    student: nn.Module,
    targets: Targets,
    rows: Rows,
    config: DistillConfig,
    *,
    checkpoints: str | None = None,
    key: str = "",
    report: Callable[[StepReport], None] | None = None,
) -> nn.Module:
    """Train `student` in place to match the teacher's next-token distribution on `rows`, by forward KL alone.

    The working weights keep the student's dtype; master weights and AdamW's moments are float32. With torch.distributed
    initialised every process takes its share of each global batch and the gradients are summed. With `checkpoints`, the
    state is saved there every `checkpoint_every` steps and the newest good one under `key` is resumed.
    Raises NonFiniteError, naming the step and its rows, when the loss or the gradient is not finite.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    state = _State(student, config)
    teacher_head = Head(targets.head)
    first = state.resume(checkpoints, key) if checkpoints else 0
    student.train()
    clock, clock_tokens = time.perf_counter(), 0
    for step in range(first, config.steps):
        indices = rows_for_step(len(rows), config.batch_rows, step, config.seed)
        share = _forward_backward(student, targets, teacher_head, rows, indices[rank::world], config)
        rate = learning_rate(
            step,
            total_steps=config.steps,
            peak=config.peak_lr,
            minimum=config.min_lr,
            warmup_steps=config.warmup_steps,
        )
        loss, norm = state.update(share, rate, world, where=f"step {step}, rows {indices}")
        clock_tokens += len(indices) * rows.seq_length
        done = step + 1
        if report and (done % config.report_every == 0 or done == config.steps):
            elapsed = time.perf_counter() - clock
            tokens = done * config.batch_rows * rows.seq_length
            report(StepReport(done, config.steps, loss, rate, norm, tokens, clock_tokens / elapsed))
            clock, clock_tokens = time.perf_counter(), 0
        if checkpoints and config.checkpoint_every and done % config.checkpoint_every == 0 and done < config.steps:
            if rank == 0:
                save_checkpoint(checkpoints, done, state.tensors(), key=key)
            if world > 1:
                dist.barrier()
    return student.eval()


def _forward_backward(
    student: nn.Module,
    targets: Targets,
    teacher_head: Head,
    rows: Rows,
    indices: Sequence[int],
    config: DistillConfig,
) -> Tensor:
    """Gradients of this process's share of the global mean loss, left on the parameters; returns that share."""
    device = head_of(student).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(indices), config.micro_batch_rows):
        part = indices[start : start + config.micro_batch_rows]
        tokens = rows.take(part).to(device)
        teacher = targets.hidden(part, tokens)
        hidden = final_hidden(student, tokens)
        loss = linear_kl_div(
            hidden.flatten(0, 1), head_of(student), teacher.flatten(0, 1), teacher_head, config.temperature
        ) * (len(part) / config.batch_rows)
        loss.backward()
        total += loss.detach().double()
    return total


class _State:
    """float32 master weights and AdamW behind a working model of any dtype."""

    def __init__(self, model: nn.Module, config: DistillConfig) -> None:
        self.config = config
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone() for _, p in self.named]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    def update(self, loss: Tensor, rate: float, world: int, where: str) -> tuple[float, float]:
        """Sum over processes, clip, step, and round the new weights into the model; returns (loss, gradient norm)."""
        for master, (_, parameter) in zip(self.masters, self.named, strict=True):
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        if world > 1:
            pending = [dist.all_reduce(tensor, async_op=True) for tensor in (loss, *self._gradients())]
            for work in pending:
                work.wait()
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self.config.clip_norm, foreach=True))
        if not torch.isfinite(loss) or not torch.isfinite(torch.tensor(norm)):
            raise NonFiniteError(
                f"loss {float(loss)} and gradient norm {norm} at {where}",
                "lower the learning rate, or look at those rows of the data",
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._round()
        return float(loss), norm

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
