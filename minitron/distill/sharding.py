"""A student split over the processes (FSDP2): each holds its part of the float32 master weights and of the moments.

A layer's weights are gathered in the student's dtype when the layer runs, and its gradients summed in float32 into the
parts. What is outside the layers, the head among it, is gathered once for all micro-batches of a step and reduced once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from minitron.errors import InputError
from minitron.models import layers_of


@contextmanager
def working_copy(student: nn.Module) -> Iterator[nn.Module]:
    """A copy of `student` to be sharded; on leaving without an error its weights are gathered back into `student`, in every
    process. Until then `student` waits in main memory."""
    device = next(student.parameters()).device
    working = copy.deepcopy(student)
    student.to("cpu")
    try:
        yield working
        with torch.no_grad():
            for mine, trained in zip(student.parameters(), working.parameters(), strict=True):
                mine.copy_(trained.full_tensor() if isinstance(trained, DTensor) else trained)
    finally:
        student.to(device)


def shard_(objective: Any) -> None:
    """Split the parameters of an `Objective`'s student and projection over all processes.

    The whole objective is the root, so that the head is a plain matrix while the losses read it.
    Raises InputError for a student with parameters of several dtypes.
    """
    student, intermediate = objective.student, objective.intermediate
    dtypes = {parameter.dtype for parameter in student.parameters()}
    if len(dtypes) > 1:
        raise InputError(
            f"student: its parameters are {' and '.join(sorted(map(str, dtypes)))}",
            "load it in one dtype, or do not shard",
        )
    mesh = init_device_mesh(next(student.parameters()).device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtypes.pop(), reduce_dtype=torch.float32, cast_forward_inputs=False)
    for parameter in student.parameters():
        parameter.data = parameter.data.float()
    for layer in layers_of(student):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if intermediate is not None:
        fully_shard(intermediate, mesh=mesh)
    fully_shard(objective, mesh=mesh, mp_policy=policy)
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # shares of a mean are summed
            module.set_force_sum_reduction_for_comms(True)


def begin_micro_batch(objective: Any, *, last: bool) -> None:
    """Keep what is outside the layers gathered, and its gradients to itself, until the last micro-batch of a step."""
    objective.set_reshard_after_backward(last, recurse=False)
    objective.set_requires_gradient_sync(last, recurse=False)


@contextmanager
def gathered(objective: Any) -> Iterator[None]:
    """Within the block the student can be run by itself, by all processes alike."""
    if isinstance(objective, FSDPModule):
        objective.unshard()
    try:
        yield
    finally:
        if isinstance(objective, FSDPModule):
            objective.reshard()
