"""The main memory that a process needs whose models are on a GPU, from architectures and settings alone: bytes of each item."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from minitron.architecture import Architecture
from minitron.arguments import check_type
from minitron.distill.config import ADAMW_8BIT, ADAMW_OFFLOAD, DistillConfig
from minitron.distill.low_bit import MOMENT_BYTES
from minitron.distill.offload import buffer_sizes
from minitron.distill.sharding import STATE_BYTES, parts_of
from minitron.distill.teacher.shards import READ_AHEAD_BYTES
from minitron.distill.teacher.stored import stored_bytes
from minitron.memory import FLOAT, LIBRARIES
from minitron.meta_models import FILE_BYTES

CONTEXT = 2_000_000_000
"""Bytes of main memory of CUDA's context, cuBLAS, cuDNN and NCCL in a process. Assumed, not measured."""


@dataclass(frozen=True)
class HostMemory:
    """Peak main memory of one process that computes on a GPU, bytes, by use."""

    libraries: int = LIBRARIES
    context: int = CONTEXT
    optimizer: int = 0
    """What `adamw-offload` keeps there: float32 weights, both moments, and pinned buffers for gradients and new weights."""
    checkpoint: int = 0
    """The copy of the training state that is written in the background, in pinned memory."""
    reading: int = 0
    """Weights on their way from a file to the GPU, or a model that is converted."""
    rows: int = 0
    """Rows of the teacher that are read ahead, and pinned buffers of those on their way to or from the GPU."""

    @property
    def parts(self) -> dict[str, int]:
        """The items that are not 0, the largest first."""
        return dict(sorted(((n, size) for n, size in asdict(self).items() if size), key=lambda part: -part[1]))

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def training_host_memory(
    student: Architecture,
    config: DistillConfig,
    seq_length: int,
    *,
    teacher: Architecture | None = None,
    stored: bool = True,
    processes: int = 1,
    node_processes: int = 0,
    gpu_bytes: int = 0,
    value_bytes: int = 2,
    trained: float = 1.0,
    saved: bool | None = None,
) -> HostMemory:
    """Main memory of each of `processes` that train `student` on GPUs.

    stored: the teacher's hidden states are read from a store; otherwise the teacher runs on the GPUs. saved: whether the state
    is ever saved, by default if `config.checkpoint_every` is set. The other arguments are those of
    `minitron.distill.gpu_memory.gpu_memory`.
    """
    check_type("student", student, Architecture)
    check_type("config", config, DistillConfig, "a DistillConfig")
    split = config.shard and processes > 1
    parts = parts_of(STATE_BYTES * student.num_parameters, processes, node_processes, gpu_bytes) if split else 1
    offloaded = config.optimizer == ADAMW_OFFLOAD
    optimizer = 0
    if offloaded:
        values = int(trained * student.num_parameters)
        optimizer = 3 * FLOAT * values + sum(map(pinned_bytes, buffer_sizes(values, value_bytes)))
    saved = bool(config.checkpoint_every) if saved is None else saved
    checkpoint = _checkpoint_bytes(student, config, processes, parts, trained, pinned=not offloaded) if saved else 0
    reading = -(-value_bytes * student.largest_tensor // parts)
    rows = 0
    if teacher is not None and stored:
        own = -(-config.batch_rows // processes)
        ahead = stored_bytes(2 * own, seq_length, teacher.hidden_size, value_bytes)
        micro = stored_bytes(min(own, config.micro_batch_rows), seq_length, teacher.hidden_size, value_bytes)
        rows = min(READ_AHEAD_BYTES, ahead) + 2 * pinned_bytes(micro)
    elif teacher is not None:
        reading = max(reading, value_bytes * teacher.largest_tensor)
    return HostMemory(optimizer=optimizer, checkpoint=checkpoint, reading=reading, rows=rows)


def storing_host_memory(
    teacher: Architecture, value_bytes: int, shard_bytes: int, *, processes: int = 1, split: bool = False
) -> HostMemory:
    """Main memory of each of `processes` that run the teacher and write its hidden states in shards of about `shard_bytes`;
    two pinned buffers take turns. split: no process has the whole teacher."""
    reading = value_bytes * teacher.largest_tensor // (processes if split else 1)
    return HostMemory(reading=reading, rows=2 * pinned_bytes(shard_bytes))


def file_bytes(model: Architecture, value_bytes: int) -> int:
    """Main memory with which the first process writes a checkpoint of `model` (see `minitron.meta_models.write_model`)."""
    return min(FILE_BYTES, value_bytes * model.num_parameters) + value_bytes * model.largest_tensor


def pinned_bytes(size: int) -> int:
    """Bytes that PyTorch takes for `size` bytes of pinned memory: the next power of two."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


def _checkpoint_bytes(
    student: Architecture, config: DistillConfig, processes: int, parts: int, trained: float, *, pinned: bool
) -> int:
    """Bytes of a process's copy of masters and moments. What is split is copied by those who hold it, other tensors are shared
    out to all processes."""
    moment = MOMENT_BYTES if config.optimizer == ADAMW_8BIT else FLOAT
    total = 0
    for shape in _shapes(student):
        if parts > 1:
            shape = (-(-shape[0] // parts), *shape[1:])
        for value_bytes in (FLOAT, moment, moment):
            size = int(value_bytes * math.prod(shape))
            total += pinned_bytes(size) if pinned else size
    return int(trained * total) // (1 if parts > 1 else processes)


def _shapes(architecture: Architecture) -> Iterator[Sequence[int]]:
    """The shapes of all parameters."""
    for parameter in architecture.outer_parameters:
        yield tuple(map(architecture.axis_size, parameter.axes))
    inner = [tuple(map(architecture.axis_size, parameter.axes)) for parameter in architecture.layer_parameters]
    for _ in range(architecture.num_layers):
        yield from inner
