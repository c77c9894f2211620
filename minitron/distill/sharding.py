"""Models sharded over the processes with FSDP2. Each process holds a shard of the student's float32 master weights and
optimizer moments, and of the teacher's layers.

A layer's weights are gathered in the student's dtype when the layer runs, and its gradients are reduced in float32 into the
shards. Parameters outside the layers, including the head, are gathered and reduced once per step, not per micro-batch.
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
from minitron.models import decoder_and_head, layers_of


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


def shard_teacher_(model: nn.Module, device: torch.device) -> None:
    """Split the layers of a model that is only run forward over all processes, each moved to `device` as it is split."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = layers_of(model)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    inside = set(layers.parameters())
    # the root of the layers, so that one is gathered while the one before it runs
    fully_shard(decoder_and_head(model)[0], mesh=mesh, ignored_params=set(model.parameters()) - inside)


def fits_beside(model_bytes: int, student: nn.Module, *, shard: bool) -> bool:
    """Whether a model of so many bytes fits whole on every process's GPU beside the training of `student`, which is there
    already, with a third of what was free left for activations and logits. True where there is no GPU.

    The training adds 16 bytes for each parameter: float32 weights, gradients and two moments; with `shard` in parts.
    """
    device = next(student.parameters()).device
    if device.type != "cuda":
        return True
    world = dist.get_world_size() if dist.is_initialized() else 1
    training = 16 * sum(parameter.numel() for parameter in student.parameters()) / (world if shard else 1)
    free = torch.tensor(torch.cuda.mem_get_info(device)[0], device=device)
    if world > 1:
        dist.all_reduce(free, dist.ReduceOp.MIN)  # all decide alike
    return model_bytes + training < 2 / 3 * int(free)


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
