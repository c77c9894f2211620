"""Preparing a training: student, teacher and losses on their device, computing as the config says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitron.data import DocumentBoundaries
from minitron.device import device
from minitron.distill.blocks import compiled_blocks, running_blocks
from minitron.distill.config import DistillConfig
from minitron.distill.determinism import deterministic_kernels
from minitron.distill.fp8 import capability_of, check_fp8, fp8_linears
from minitron.distill.losses import Losses
from minitron.distill.losses.objective import Objective
from minitron.distill.sharding import shard_, working_copy
from minitron.distill.teacher.live import LiveTeacher, Targets
from minitron.distill.timing import Stopwatch
from minitron.evaluation.mode import evaluating
from minitron.meta_models import InMemory, Weights, on_meta, read_
from minitron.models import head_of


@dataclass(frozen=True)
class Prepared:
    """An objective that is ready to be trained."""

    objective: Objective
    """Its student is the given one, or a sharded copy of a student that was given in memory."""
    device: torch.device
    dtype: torch.dtype
    """The dtype that the student computes in."""
    sharded: bool
    """Whether the student's parameters are split over the processes."""


@contextmanager
def preparation(
    student: nn.Module,
    targets: Targets | None,
    seq_length: int,
    config: DistillConfig,
    losses: Losses,
    channels: Tensor | None,
    documents: DocumentBoundaries | None,
    weights: Weights | None,
) -> Iterator[Prepared]:
    """Prepare a training for the duration of the block; the arguments are those of `distill`, and seq_length that of its rows.

    Afterwards the models compute as before, and a sharded student that was given in memory has the trained weights. Raises
    the InputErrors of `Objective`, `shard_` and `check_fp8`.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    sharded = config.shard and world > 1
    compute_device = device() if on_meta(student) else next(student.parameters()).device
    dtype = head_of(student).dtype
    if config.fp8 != "none":
        check_fp8(dtype, seq_length, capability_of(compute_device))
    with ExitStack() as stack:
        if config.deterministic:
            stack.enter_context(deterministic_kernels(compute_device))
        working = student
        if sharded and weights is None:
            working, weights = stack.enter_context(working_copy(student)), InMemory(student)
        if weights is not None and not sharded:
            read_(working, weights, dtype, compute_device)
        # a step depends on weights and rows alone: no dropout, no noise on routers
        stack.enter_context(evaluating(working))
        watch = Stopwatch(compute_device)
        objective = Objective(working, targets, losses, channels, watch, documents, weights if sharded else None)
        compared = objective.intermediate
        if compared:
            compared.to(compute_device)
        teacher = objective.targets.model if isinstance(objective.targets, LiveTeacher) else None
        stack.enter_context(fp8_linears(working, config.fp8, compute_device, with_gradients=True))
        if teacher is not None:
            stack.enter_context(fp8_linears(teacher, config.fp8, compute_device, with_gradients=False))
        stack.enter_context(
            running_blocks(
                working,
                activation_checkpointing=config.activation_checkpointing,
                compiled=config.compile,
                recorded=compared.student_modules if compared else (),
            )
        )
        if config.compile and teacher is not None:
            recorded = compared.teacher_modules if compared else ()
            stack.enter_context(compiled_blocks(teacher, recorded=recorded))
        if world > 1:
            _start_alike(objective)
        if sharded:
            assert weights is not None
            shard_(objective, compute_device)
            read_(working, weights, dtype, compute_device)
        yield Prepared(objective, compute_device, dtype, sharded)


def _start_alike(objective: Objective) -> None:
    """Broadcast the initial values of trained parameters from process 0. Projections and adapters are computed in each process
    and may differ in the last bits between machines. Weights on the meta device are read from the same file by all."""
    for _, parameter in objective.trained():
        if not parameter.is_meta:
            dist.broadcast(parameter.detach(), 0)
