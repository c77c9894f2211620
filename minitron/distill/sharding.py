"""Models sharded over the processes with FSDP2. Each process holds a shard of the student's float32 master weights and
optimizer moments, and of the teacher's layers.

FSDP's units are each layer, the embedding, and a root with the head, the final norm, a tied embedding and all else outside
the layers. A unit's weights are gathered in the student's dtype when it runs, and its gradients are reduced in float32 into
the shards after each micro-batch. Models are split on the meta device, so that none is ever whole in a process;
`minitron.meta_models` reads the rows of each process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from minitron.errors import InputError
from minitron.meta_models import emptied
from minitron.models import decoder_and_head, layers_of
from minitron.sharded_tensors import whole

STATE_BYTES = 16
"""Bytes per trained parameter: float32 master weight, gradient and AdamW's two moments."""
NODE_SHARE = 0.4
"""Share of a GPU's memory that a model may take if it is split inside each node only."""

# The meshes for HSDP, by default process group: the groups of a mesh hold communicators, with GPU memory, as long as it exists.
_node_meshes: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[str, tuple[int, ...]], DeviceMesh]] = WeakKeyDictionary()


@contextmanager
def working_copy(student: nn.Module) -> Iterator[nn.Module]:
    """A copy of `student` on the meta device, to be sharded and filled with its weights. `student` is in main memory meanwhile.
    If the block ends without an error, the trained weights are gathered into `student` in every process."""
    device = next(student.parameters()).device
    working = emptied(student)
    student.to("cpu")
    try:
        yield working
        with torch.no_grad():
            for mine, trained in zip(student.parameters(), working.parameters(), strict=True):
                mine.copy_(whole(trained))
    finally:
        student.to(device)


def shard_(objective: Any, device: torch.device) -> None:
    """Split the parameters of an `Objective`'s student, which is on the meta device, and projection over the processes.

    The whole objective is the root, so that the head is a plain matrix while the losses read it.
    Raises InputError for a student with parameters of several dtypes.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

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
    from torch.distributed.fsdp import fully_shard

    layers = layers_of(model)
    mesh = mesh_of(device, sum(parameter.nbytes for parameter in layers.parameters()))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    inside = set(layers.parameters())
    # the root of the layers, so that one is gathered while the one before it runs
    fully_shard(decoder_and_head(model)[0], mesh=mesh, ignored_params=set(model.parameters()) - inside)


def state_bytes(student: nn.Module) -> int:
    """Bytes of a student's training state in all processes that share it together."""
    return STATE_BYTES * sum(parameter.numel() for parameter in student.parameters())


def mesh_of(device: torch.device, size: int) -> DeviceMesh:
    """The device mesh over which a model whose state takes `size` bytes is split (see `mesh_shape`); student, teacher and the
    models after them share one of each shape."""
    shape = mesh_shape(device, size)
    if len(shape) == 1:
        return init_device_mesh(device.type, shape, mesh_dim_names=("shards",))  # uses the default group
    default = dist.group.WORLD
    assert default is not None
    made = _node_meshes.setdefault(default, {})
    if (device.type, shape) not in made:
        made[device.type, shape] = init_device_mesh(device.type, shape, mesh_dim_names=("nodes", "shards"))
    return made[device.type, shape]


def mesh_shape(device: torch.device, size: int) -> tuple[int, ...]:
    """Shape of the mesh over which a model whose state takes `size` bytes is split: (processes,) over all of them; or HSDP,
    (nodes, processes per node), split inside a node with a copy in every node, which sends less between nodes."""
    world = dist.get_world_size()
    parts = parts_of(size, world, workers_per_node(device), _gpu_bytes(device))
    return (world,) if parts == world else (world // parts, parts)


def parts_of(size: int, processes: int, node_processes: int, gpu_bytes: int) -> int:
    """Number of processes over which a model whose state takes `size` bytes is split: those of one node if that leaves enough
    memory on its GPUs, otherwise all."""
    several = 1 < node_processes < processes and processes % node_processes == 0
    return node_processes if several and size / node_processes <= NODE_SHARE * gpu_bytes else processes


def workers_per_node(device: torch.device) -> int:
    """Number of processes per node, from the environment that Ray Train and torchrun set; 0 unless it is the same on every node
    and the ranks of a node are consecutive."""
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
    """With HSDP, sum the gradients over the nodes in the last micro-batch of a step only."""
    objective.set_requires_all_reduce(last)


@contextmanager
def gathered(objective: Any) -> Iterator[None]:
    """Within the block the student can be run by itself, by all processes alike."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(objective, FSDPModule):
        objective.unshard()
    try:
        yield
    finally:
        if isinstance(objective, FSDPModule):
            objective.reshard()
