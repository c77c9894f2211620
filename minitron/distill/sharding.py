"""Models sharded over the processes with FSDP2. Each process holds a shard of the student's float32 master weights and
optimizer moments, and of the teacher's layers.

A layer's weights are gathered in the student's dtype when the layer runs, and its gradients are reduced in float32 into the
shards after each micro-batch. So are the embedding and, together, the head, the final norm and whatever else is outside the
layers; an embedding that is the head as well is among those. Models are split on the meta device: none is ever whole in a
process (`minitron.meta_models` reads each process's rows).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from minitron.errors import InputError
from minitron.meta_models import emptied
from minitron.models import decoder_and_head, layers_of

STATE_BYTES = 16
"""Of a parameter that is trained: float32 master weight, gradient and two moments."""
NODE_SHARE = 0.4
"""Of a GPU's memory that a model which is split inside the node alone may take."""


@contextmanager
def working_copy(student: nn.Module) -> Iterator[nn.Module]:
    """A copy of `student` on the meta device, to be sharded and filled from its weights; on leaving without an error they are
    gathered back into `student`, in every process. Until then `student` waits in main memory."""
    device = next(student.parameters()).device
    working = emptied(student)
    student.to("cpu")
    try:
        yield working
        with torch.no_grad():
            for mine, trained in zip(student.parameters(), working.parameters(), strict=True):
                mine.copy_(trained.full_tensor() if isinstance(trained, DTensor) else trained)
    finally:
        student.to(device)


def shard_(objective: Any, device: torch.device) -> None:
    """Split the parameters of an `Objective`'s student, which is on the meta device, and projection over the processes.

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
    mesh = mesh_of(device, state_bytes(student))
    policy = MixedPrecisionPolicy(param_dtype=dtypes.pop(), reduce_dtype=torch.float32, cast_forward_inputs=False)
    for parameter in student.parameters():
        parameter.data = parameter.data.float()
    for layer in layers_of(student):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    embedding = student.get_input_embeddings()
    if embedding.weight is not decoder_and_head(student)[1]:
        fully_shard(embedding, mesh=mesh, mp_policy=policy)
        embedding.set_unshard_in_backward(False)  # its gradient does not depend on it
    if intermediate is not None:
        fully_shard(intermediate, mesh=mesh)
    fully_shard(objective, mesh=mesh, mp_policy=policy)
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # shares of a mean are summed
            module.set_force_sum_reduction_for_comms(True)


def shard_teacher_(model: nn.Module, device: torch.device) -> None:
    """Split the layers of a model on the meta device, which is only run forward, over the processes."""
    layers = layers_of(model)
    mesh = mesh_of(device, sum(parameter.nbytes for parameter in layers.parameters()))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    inside = set(layers.parameters())
    # the root of the layers, so that one is gathered while the one before it runs
    fully_shard(decoder_and_head(model)[0], mesh=mesh, ignored_params=set(model.parameters()) - inside)


def state_bytes(student: nn.Module) -> int:
    """Of a student in training, in all processes that it is split over together."""
    return STATE_BYTES * sum(parameter.numel() for parameter in student.parameters())


def mesh_of(device: torch.device, size: int) -> DeviceMesh:
    """The processes that a model whose state takes `size` bytes is split over, in the shape that `mesh_shape` gives."""
    shape = mesh_shape(device, size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("nodes", "shards")[-len(shape) :])


def mesh_shape(device: torch.device, size: int) -> tuple[int, ...]:
    """How a model whose state takes `size` bytes is split: (processes), over all of them; or (nodes, processes of a node), over
    those of a node, with a copy in every node (HSDP), which sends little over the slow network between nodes."""
    world = dist.get_world_size()
    parts = parts_of(size, world, workers_per_node(device), _gpu_bytes(device))
    return (world,) if parts == world else (world // parts, parts)


def parts_of(size: int, processes: int, node_processes: int, gpu_bytes: int) -> int:
    """Over how many processes a model is split whose state takes `size` bytes: those of a node, each of which then has a copy
    that little is sent of, where that leaves room on its GPUs; else all."""
    several = 1 < node_processes < processes and processes % node_processes == 0
    return node_processes if several and size / node_processes <= NODE_SHARE * gpu_bytes else processes


def workers_per_node(device: torch.device) -> int:
    """The number of processes on each node, as Ray Train and torchrun say it, where it is the same on all and their ranks
    are in order; else 0."""
    local, number = int(os.environ.get("LOCAL_WORLD_SIZE", "0")), int(os.environ.get("LOCAL_RANK", "-1"))
    regular = bool(local) and dist.get_rank() % local == number and dist.get_world_size() % local == 0
    said = torch.tensor([local, -local, int(regular)], device=device)
    dist.all_reduce(said, dist.ReduceOp.MIN)
    least, most, regular = said.tolist()
    return least if regular and least == -most else 0


def _gpu_bytes(device: torch.device) -> int:
    """Memory of the smallest GPU among the processes; 0 without one."""
    if device.type != "cuda":
        return 0
    total = torch.tensor(torch.cuda.get_device_properties(device).total_memory, device=device)
    dist.all_reduce(total, dist.ReduceOp.MIN)
    return int(total)


def begin_micro_batch(objective: Any, *, last: bool) -> None:
    """Add up the gradients of the copies in other nodes in the last micro-batch of a step alone."""
    objective.set_requires_all_reduce(last)


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
