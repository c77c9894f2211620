"""The settings with which each trainer is measured: those that are given, and what fits on the GPU for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.shapes import fit
from minitron.architecture import Architecture
from minitron.distill import DistillConfig
from minitron.distill.config import ADAMW, ADAMW_OFFLOAD


@dataclass(frozen=True)
class Settings:
    micro_batch_rows: int
    recompute: str
    """What the backward pass computes again, as `DistillConfig.activation_checkpointing`. The others' trainers have all or
    nothing: "selective" is "full" there."""
    optimizer: str = "adamw"
    """One of `OPTIMIZERS`; the others' trainers always keep the optimizer on the GPU."""
    estimate: int = 0
    """Bytes that the training takes by `minitron.distill.gpu_memory`; 0 if it was not estimated."""

    def __str__(self) -> str:
        rows = f"{self.micro_batch_rows} row{'s' if self.micro_batch_rows > 1 else ''}"
        return f"{rows}, recompute {self.recompute}, {self.optimizer}"


@dataclass(frozen=True)
class Wanted:
    """What is given on the command line; None: chosen by memory on a GPU, and on a CPU all rows at once, nothing again."""

    batch_rows: int
    micro_batch_rows: int | None = None
    recompute: str | None = None
    optimizer: str | None = None
    fp8: str = "none"


def settings_to_try(
    wanted: Wanted,
    teacher: Architecture,
    student: Architecture,
    seq_length: int,
    gpu_bytes: int,
    *,
    ours: bool,
    live: bool,
) -> list[Settings]:
    """Settings from the fastest to those that take the least memory: the first that doesn't run out of memory is measured."""
    rows, recompute = wanted.micro_batch_rows, wanted.recompute
    given = Settings(rows or wanted.batch_rows, recompute or "none", wanted.optimizer or "adamw")
    if not gpu_bytes:
        return [given]
    tries = _ours(wanted, teacher, student, seq_length, gpu_bytes, live) if ours else _others(wanted)
    return list(
        dict.fromkeys(
            replace(one, micro_batch_rows=rows or one.micro_batch_rows, recompute=recompute or one.recompute)
            for one in tries
        )
    )


def _ours(
    wanted: Wanted, teacher: Architecture, student: Architecture, seq_length: int, gpu_bytes: int, live: bool
) -> list[Settings]:
    """The fit by the estimate, and what takes less for the case that the estimate is too low."""
    optimizers: Sequence[str] = [wanted.optimizer] if wanted.optimizer else (ADAMW, ADAMW_OFFLOAD)
    tries: list[Settings] = []
    for optimizer in optimizers:
        config = DistillConfig(
            1,
            batch_rows=wanted.batch_rows,
            micro_batch_rows=wanted.micro_batch_rows or 1,
            activation_checkpointing=wanted.recompute or "none",
            optimizer=optimizer,
            fp8=wanted.fp8,
        )
        free = {"micro_batch_rows": wanted.micro_batch_rows, "activation_checkpointing": wanted.recompute}
        chosen = [name for name, value in free.items() if value is None]
        found = fit(teacher, student, config, seq_length, gpu_bytes, live=live, chosen=chosen)
        settled = found.config
        if found.fits or optimizer == optimizers[-1]:
            tries.append(
                Settings(settled.micro_batch_rows, settled.activation_checkpointing, optimizer, found.memory.peak)
            )
            tries.append(Settings(1, "full", optimizer))
    return tries


def _others(wanted: Wanted) -> list[Settings]:
    rows = wanted.batch_rows
    return [Settings(rows, "none"), Settings(rows, "full"), Settings(1, "none"), Settings(1, "full")]
