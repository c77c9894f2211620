"""What a distillation says of its steps."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from minitron.device import matmul_flops
from minitron.distill.config import DistillConfig
from minitron.distill.losses.objective import Objective
from minitron.distill.utilisation import training_flops_per_token

ASIDE = ("evaluation", "report")  # parts that are no training
# Names of metrics that differ from those of the report's fields.
METRIC_NAMES = {
    "loss": "train_loss",
    "kl": "train_kl",
    "cross_entropy": "train_cross_entropy",
    "intermediate": "train_intermediate",
    "utilisation": "flop_utilisation",
    "skipped": "skipped_steps",
}


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
    utilisation: float
    """Model FLOP utilisation, see `minitron.distill.utilisation`."""
    seconds: dict[str, float]
    """What a step took in each part since the last report, in `minitron.distill.timing.PARTS`; evaluations and checkpoints
    are spread over the steps."""
    skipped: int
    """Steps passed over so far because their loss or gradient was not finite."""

    @property
    def bound_by(self) -> str:
        """The part that took longest."""
        return max(self.seconds, key=lambda part: self.seconds[part])

    def metrics(self) -> dict[str, float]:
        """Every figure by the name that records and charts have for it: what is not used is left out, losses of the training
        rows begin with "train_", seconds of the parts with "seconds_". A new field is in it by itself."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("step", "steps", "seconds")}
        named = {METRIC_NAMES.get(name, name): value for name, value in values.items() if value is not None}
        return named | {f"seconds_{part}": value for part, value in self.seconds.items()}


class Reporter:
    """Makes the reports of one process, whose models compute in `dtype`, from step `done` on."""

    def __init__(
        self, objective: Objective, config: DistillConfig, seq_length: int, dtype: torch.dtype, done: int
    ) -> None:
        self.objective, self.config = objective, config
        self.step_tokens = config.batch_rows * seq_length
        self.flops = training_flops_per_token(objective.student, objective.targets, seq_length)
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.peak = world * (config.peak_flops or matmul_flops(dtype))
        self.done = done
        objective.watch.restart()

    def report(self, done: int, parts: list[float], rate: float, norm: float, skipped: int) -> StepReport:
        """The report after `done` steps of the last one's loss and its parts, as `Objective` gives them."""
        steps, self.done = done - self.done, done
        seconds = {part: total / steps for part, total in self.objective.watch.seconds().items()}
        speed = self.step_tokens / sum(value for part, value in seconds.items() if part not in ASIDE)
        losses = self.objective.losses
        loss, kl, cross_entropy, intermediate = parts
        return StepReport(
            step=done,
            steps=self.config.steps,
            loss=loss,
            kl=None if losses.logits == "none" else kl,
            cross_entropy=cross_entropy if losses.cross_entropy else None,
            intermediate=intermediate if losses.needs_live_teacher else None,
            learning_rate=rate,
            grad_norm=norm,
            tokens=done * self.step_tokens,
            tokens_per_second=speed,
            utilisation=speed * self.flops / self.peak,
            seconds=seconds,
            skipped=skipped,
        )
