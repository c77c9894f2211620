"""Bytes that the GPUs of a training exchange in a step."""

from __future__ import annotations

import math

from minitron.distill.gpu_memory import layer_parameters
from minitron.distill.sharding import STATE_BYTES, parts_of
from minitron_platform.estimates.gpu import GpuTraining

GRADIENT_BYTES = 4  # float32


def step_traffic(training: GpuTraining, live_teacher: bool) -> tuple[float, float]:
    """Bytes that a GPU sends in a step to the other GPUs of its node, and to other nodes.

    Collectives over several nodes send as much between two nodes as inside one, over the network cards of all GPUs of a node.
    """
    processes, node = training.processes, training.node_processes
    if processes == 1:
        return 0.0, 0.0
    fit = training.fit()
    several_nodes = processes > node
    parameters = training.student.num_parameters
    inside = between = 0.0
    rows = math.ceil(fit.config.batch_rows / processes)
    micro_rows = fit.config.micro_batch_rows
    micro_batches = math.ceil(rows / micro_rows) if isinstance(micro_rows, int) else 1
    if fit.config.shard:
        # weights are gathered for the forward and the backward pass, gradients reduced
        exchanged = micro_batches * parameters * (2 * training.value_bytes + GRADIENT_BYTES)
        inside += exchanged
        parts = parts_of(STATE_BYTES * parameters, processes, node, training.gpu_bytes)
        if parts < processes:  # a copy in every node, whose shards are summed once in a step
            between += 2 * GRADIENT_BYTES * parameters / parts
        elif several_nodes:
            between += exchanged / node
    else:
        inside += 2 * GRADIENT_BYTES * parameters
        between += 2 * GRADIENT_BYTES * parameters / node if several_nodes else 0
    if live_teacher and training.teacher and fit.teacher_kept == "sharded":
        layers = training.teacher.num_layers * layer_parameters(training.teacher) * training.value_bytes
        gathered = micro_batches * layers
        inside += gathered
        if several_nodes and parts_of(layers, processes, node, training.gpu_bytes) == processes:
            between += gathered / node
    return inside, between
