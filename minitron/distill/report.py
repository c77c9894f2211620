"""Reports on the steps of a distillation: losses, speed and times."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from minitron.device import datasheet_flops, matmul_flops
from minitron.distill.config import DistillConfig
from minitron.distill.losses.objective import Objective
from minitron.distill.utilisation import training_flops_per_token

ASIDE = ("evaluation", "report")  # parts that do not count as training time
# Names of metrics that differ from those of the report's fields.
METRIC_NAMES = {
    "loss": "train_loss",
    "kl": "train_kl",
    "cross_entropy": "train_cross_entropy",
    "intermediate": "train_intermediate",
    "utilisation": "flop_utilisation",
    "datasheet_utilisation": "datasheet_flop_utilisation",
    "skipped": "skipped_steps",
}


@dataclass(frozen=True)
class StepReport:
    """One training step. `loss` is the whole objective on the step's rows; terms that the objective lacks are None."""

    step: int
    steps: int
    loss: float
    kl: float | None
    """Divergence from the teacher by the measure in `Losses.logits`, by default forward KL in nats per token."""
    cross_entropy: float | None
    """Nats per token, not weighted."""
    intermediate: float | None
    """L_is, not weighted."""
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    utilisation: float
    """Model FLOP utilisation of the measured peak, or of `DistillConfig.peak_flops`; see `minitron.distill.utilisation`."""
    datasheet_utilisation: float | None
    """The same of the peak in the GPU's data sheet; None if `minitron.device.DATASHEETS` lacks it."""
    seconds: dict[str, float]
    """Seconds per step for each part in `minitron.distill.timing.PARTS`, averaged over the steps since the last report."""
    skipped: int
    """Number of steps so far that were skipped because their loss or gradient was not finite."""

    @property
    def bound_by(self) -> str:
        """The part of a step that takes longest."""
        return max(self.seconds, key=lambda part: self.seconds[part])

    def metrics(self) -> dict[str, float]:
        """All fields as {metric name: value} for records and charts, without those that are None. Names of losses start with
        "train_", names of the parts' seconds with "seconds_". New fields are included automatically."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("step", "steps", "seconds")}
        named = {METRIC_NAMES.get(name, name): value for name, value in values.items() if value is not None}
        return named | {f"seconds_{part}": value for part, value in self.seconds.items()}


class Reporter:
    """Creates the reports of one process. dtype: that of the models' computation. done: number of steps already done."""

    def __init__(
        self, objective: Objective, config: DistillConfig, seq_length: int, dtype: torch.dtype, done: int
    ) -> None:
        self.objective = objective
        self.config = config
        self.step_tokens = config.batch_rows * seq_length
        self.flops = training_flops_per_token(objective.student, objective.targets, seq_length)
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.peak = world * (config.peak_flops or matmul_flops(dtype))
        datasheet = datasheet_flops(dtype)
        self.datasheet = datasheet and world * datasheet
        self.done = done
        objective.watch.restart()

    def report(self, done: int, parts: list[float], rate: float, norm: float, skipped: int) -> StepReport:
        """The report on step `done`. parts: the loss and its terms as `Objective.forward` returns them. rate: learning rate.
        norm: L2 norm of the gradient. skipped: number of steps skipped so far."""
        steps = done - self.done
        self.done = done
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
            datasheet_utilisation=speed * self.flops / self.datasheet if self.datasheet else None,
            seconds=seconds,
            skipped=skipped,
        )
