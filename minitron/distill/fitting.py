"""Settings of a training that fit on a GPU, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from minitron.architecture import Architecture
from minitron.arguments import check_type
from minitron.distill.blocks import ACTIVATION_CHECKPOINTING
from minitron.distill.config import ON_WHOLE_STUDENTS, DistillConfig, can_be_recorded
from minitron.distill.gpu_memory import GpuMemory, TeacherKept, gpu_memory

CHOSEN = ("micro_batch_rows", "activation_checkpointing", "shard", "compile", "cuda_graphs")
"""Fields of `DistillConfig` that change results only by rounding, and can be chosen: `compile` by the length of the training,
`cuda_graphs` by the size of the student, the others according to the memory."""
SHARE = 0.9
"""Usable share of a GPU's memory; the rest is lost to fragmentation."""
KEPT: dict[TeacherKept, str] = {
    "head": "the teacher's head",
    "whole": "the whole teacher",
    "sharded": "the teacher in parts",
}
BUSY_TOKENS = 8192
"""Tokens of a micro-batch that keep a GPU busy."""
MOST_TOKENS = 16_384
"""Tokens of a micro-batch above which it does not become faster."""
LAYERS_TO_COMPILE = 10_000
"""Layers, in all micro-batches of a process, from which on their compilation pays: about 10 s at 1 ms that a compiled layer
saves, both of an H200."""

LAUNCHED_FLOPS = 1e12
"""FLOPs of a layer's forward and backward pass in a micro-batch, below which a GPU may wait for the launches of its kernels: an
H200 computes them in 2 to 3 ms, and the host launches an uncompiled layer in 4."""
RECORDED = ("llama", "qwen2", "qwen3", "nemotron")
"""Families whose micro-batches become CUDA graphs by themselves: those without windows and soft-capping, as flex_attention has
not run in a graph yet."""


@dataclass(frozen=True)
class Fit:
    """Settings for a GPU, and the memory that they need."""

    config: DistillConfig
    teacher_kept: TeacherKept
    memory: GpuMemory
    room: int
    """Bytes that the training may use."""

    @property
    def values(self) -> dict[str, int | str | bool]:
        """The settings that affect GPU memory."""
        values = {name: getattr(self.config, name) for name in (*CHOSEN, "optimizer")}
        return values | {"teacher_kept": self.teacher_kept}

    @property
    def settings(self) -> str:
        """For example "micro_batch_rows 2, activation_checkpointing none, shard, optimizer adamw, the teacher's head"."""
        config = self.config
        parts = [
            f"micro_batch_rows {config.micro_batch_rows}",
            f"activation_checkpointing {config.activation_checkpointing}",
            "shard" if config.shard else "no shard",
            f"optimizer {config.optimizer}",
            *(["compile"] if config.compile else []),
            *(["cuda_graphs"] if config.cuda_graphs else []),
        ]
        return ", ".join([*parts, KEPT[self.teacher_kept]] if self.memory.teacher else parts)

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.room


def fitting(
    student: Architecture,
    config: DistillConfig,
    seq_length: int,
    room: int,
    *,
    gpu_bytes: int = 0,
    chosen: Sequence[str] = CHOSEN,
    teacher: Architecture | None = None,
    teacher_kept: Sequence[TeacherKept] = ("head",),
    source: Architecture | None = None,
    source_kept: bool = False,
    processes: int = 1,
    node_processes: int = 0,
    value_bytes: int = 2,
    trained: float = 1.0,
    compared: int = 0,
    separate_documents: bool = False,
) -> Fit:
    """The fastest settings that fit in `room` bytes of each of `processes` GPUs, or those that need the least.

    The fields of `config` in `chosen` (a subset of `CHOSEN`) and one of `teacher_kept` are chosen. separate_documents: whether
    tokens attend only to their own document of a row. The other arguments are those of `gpu_memory`; `gpu_bytes` is the size
    of the whole GPU.
    """
    check_type("student", student, Architecture)
    check_type("config", config, DistillConfig, "a DistillConfig")
    best: Fit | None = None
    plain = all(model.family in RECORDED for model in (student, teacher) if model is not None)
    recordable = plain and trained == 1.0 and not compared and not separate_documents
    for settings, kept in _in_order(config, seq_length, chosen, teacher_kept, processes, student.num_layers):
        if "cuda_graphs" in chosen:
            small = _layer_flops(student, settings, seq_length) < LAUNCHED_FLOPS
            graphs = recordable and small and kept != "sharded" and can_be_recorded(settings)
            settings = replace(settings, cuda_graphs=graphs)
        memory = gpu_memory(
            student,
            settings,
            seq_length,
            teacher=teacher,
            teacher_kept=kept,
            source=source,
            source_kept=source_kept,
            processes=processes,
            node_processes=node_processes,
            gpu_bytes=gpu_bytes,
            value_bytes=value_bytes,
            trained=trained,
            compared=compared,
        )
        fit = Fit(settings, kept, memory, room)
        if fit.fits:
            return fit
        best = fit if best is None or memory.peak < best.memory.peak else best
    assert best is not None
    return best


def _in_order(
    config: DistillConfig,
    seq_length: int,
    chosen: Sequence[str],
    teacher_kept: Sequence[TeacherKept],
    processes: int,
    num_layers: int,
) -> Iterator[tuple[DistillConfig, TeacherKept]]:
    """All combinations, the fastest first: micro-batches that keep a GPU busy, then the least recomputation, then the least
    communication, then the most rows."""
    rows = [config.micro_batch_rows]
    if "micro_batch_rows" in chosen:
        own = -(-config.batch_rows // processes)
        rows = _halved(max(1, min(own, MOST_TOKENS // seq_length)))
    recompute: Sequence[str] = [config.activation_checkpointing]
    if "activation_checkpointing" in chosen:
        recompute = ACTIVATION_CHECKPOINTING
    shard = [config.shard]
    if "shard" in chosen:
        shard = [False, True] if processes > 1 and config.optimizer not in ON_WHOLE_STUDENTS else [False]
    busy = [n for n in rows if n * seq_length >= BUSY_TOKENS] or rows[:1]
    for group in (busy, [n for n in rows if n not in busy]):
        for how in recompute:
            for kept in teacher_kept:
                for split in shard:
                    for number in group:
                        settings = replace(config, micro_batch_rows=number, activation_checkpointing=how, shard=split)
                        if "compile" in chosen:
                            settings = replace(settings, compile=_compiled(settings, num_layers, processes))
                        yield settings, kept


def _compiled(config: DistillConfig, num_layers: int, processes: int) -> bool:
    micro_batches = -(-config.batch_rows // (processes * config.micro_batch_rows))
    return config.fp8 != "none" or config.steps * micro_batches * num_layers >= LAYERS_TO_COMPILE


def _layer_flops(student: Architecture, config: DistillConfig, seq_length: int) -> float:
    """FLOPs of a layer's forward and backward pass in a micro-batch; a layer's share of the head counts."""
    tokens = config.micro_batch_rows * seq_length
    return 3 * student.flops_per_token(seq_length) * tokens / student.num_layers


def _halved(number: int) -> list[int]:
    """The number, its half and so on down to 1."""
    return [number >> shift for shift in range(number.bit_length())]
