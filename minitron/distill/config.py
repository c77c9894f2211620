"""Distillation hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass

from minitron.arguments import check_fields
from minitron.distill.blocks import ACTIVATION_CHECKPOINTING
from minitron.distill.fp8 import FP8
from minitron.distill.schedule import SCHEDULES
from minitron.errors import InputError

ADAMW, ADAMW_OFFLOAD, ADAMW_8BIT = "adamw", "adamw-offload", "adamw-8bit"
OPTIMIZERS = (ADAMW, ADAMW_OFFLOAD, ADAMW_8BIT)
ON_WHOLE_STUDENTS = (ADAMW_OFFLOAD, ADAMW_8BIT)
"""Optimizers that do not work with `shard`, which splits the same state over the processes."""


@dataclass(frozen=True)
class DistillConfig:
    """Hyperparameters of a distillation. `batch_rows` is the global batch size, independent of the number of processes.

    The defaults of the batch, the rates and the warm-up are those of Llama-3.1-Minitron-4B at rows of 8,192 tokens
    (arXiv 2408.11796). Raises InputError for values that cannot be used.
    """

    steps: int
    batch_rows: int = 1152
    peak_lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int = 40
    schedule: str = "cosine"
    """"cosine", or "wsd": warm-up, stable, decay."""
    decay_share: float = 0.2
    """Share of the steps that "wsd" decays in, the last ones."""
    micro_batch_rows: int = 4
    shard: bool = False
    """Split weights and optimizer over the processes, where there are several (FSDP2); else each holds all of them."""
    activation_checkpointing: str = "none"
    """Activations of a layer that are recomputed in the backward pass instead of kept: "none", "selective" or "full"."""
    compile: bool = False
    """Compile the layers of the student and of a live teacher, each by itself."""
    cuda_graphs: bool = False
    """Launch all kernels of a micro-batch together, as a CUDA graph; without effect on CPUs."""
    fp8: str = "none"
    """Products of the layers' linear modules in FP8, also of a live teacher: "none", or with one scale per tensor or row,
    "tensorwise" or "rowwise". On CPUs they are emulated."""
    deterministic: bool = False
    """Use deterministic kernels on GPUs, which may be slower; CPUs always do."""
    optimizer: str = ADAMW
    """"adamw"; "adamw-offload": the same with float32 weights and moments in main memory, for a GPU that is short of it; or
    "adamw-8bit": with moments of 8 bits."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    seed: int = 0
    max_skipped_steps: int = 0
    """Number of steps with a non-finite loss or gradient that may be skipped, without an update, before the run stops."""
    checkpoint_every: int = 0  # steps; 0 for none
    evaluate_every: int = 0  # steps; 0 for never
    report_every: int = 1  # steps
    peak_flops: float = 0.0
    """FLOP/s of one process's device that the utilisation is a share of; 0 to measure a large matrix product."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule: {self.schedule!r}", f"use one of {', '.join(SCHEDULES)}")
        if self.activation_checkpointing not in ACTIVATION_CHECKPOINTING:
            raise InputError(
                f"activation_checkpointing: {self.activation_checkpointing!r}",
                f"use one of {', '.join(ACTIVATION_CHECKPOINTING)}",
            )
        if self.fp8 not in FP8:
            raise InputError(f"fp8: {self.fp8!r}", f"use one of {', '.join(FP8)}")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"optimizer: {self.optimizer!r}", f"use one of {', '.join(OPTIMIZERS)}")
        if self.optimizer in ON_WHOLE_STUDENTS and self.shard:
            raise InputError(
                f"optimizer: {self.optimizer} with shard, which splits the same over the processes",
                "use one of the two",
            )
        if self.cuda_graphs and not can_be_recorded(self):
            other = (
                "shard" if self.shard else f"fp8: {self.fp8}" if self.fp8 != "none" else f"optimizer: {self.optimizer}"
            )
            raise InputError(f"cuda_graphs with {other}", "use one of the two")
        if not 0 <= self.decay_share <= 1:
            raise InputError(f"decay_share: {self.decay_share} is no share of the steps", "use 0 to 1")


def can_be_recorded(config: DistillConfig) -> bool:
    """Whether the micro-batches of such a training can be CUDA graphs."""
    return not config.shard and config.fp8 == "none" and config.optimizer != ADAMW_OFFLOAD
