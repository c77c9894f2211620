"""The bandwidth of an all-reduce, as training does it for gradients: NCCL on GPUs, gloo on CPUs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from minitron_platform.doctor.finding import Finding

GPU_BYTES = 256 << 20
CPU_BYTES = 16 << 20
ROUNDS = 5
TIMEOUT_SECONDS = 60.0
SLOW_GPUS = 10e9  # bytes per second; PCIe and a network card of 100 Gbit/s have more


def all_reduce_bandwidth(rank: int, world_size: int, address: str, device: int = 0) -> float:
    """Bytes per second that each process sends in an all-reduce of all processes, called in each of them.

    For n processes and a tensor of S bytes that takes t seconds: 2 (n - 1) / n * S / t, the bus bandwidth of NCCL's tests.
    It is that of the slowest connection, whatever the number of processes. address: tcp://HOST:PORT of the first process.
    device: number of this process's GPU.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=address,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    try:
        size = GPU_BYTES if on_gpu else CPU_BYTES
        tensor = torch.ones(size // 4, device="cuda" if on_gpu else "cpu")
        _timed(tensor, 2)  # connections are made at first use
        took = _timed(tensor, ROUNDS)
    finally:
        dist.destroy_process_group()
    return 2 * (world_size - 1) / world_size * size * ROUNDS / took


def _timed(tensor: torch.Tensor, rounds: int) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(rounds):
        dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def finding(where: str, processes: int, on_gpus: bool, measured: Sequence[str], errors: Sequence[str]) -> Finding:
    """The finding from what the processes returned, as text, and from their errors."""
    backend = "NCCL" if on_gpus else "gloo"
    speeds = [float(text) for text in measured if text.strip()]
    if len(speeds) < processes:
        reason = next((error.strip().splitlines()[-1] for error in errors if error.strip()), "no answer")
        network = "NCCL_SOCKET_IFNAME (NCCL_DEBUG=INFO says more)" if on_gpus else "GLOO_SOCKET_IFNAME"
        remedy = f"open all ports between the nodes, and name their network in {network}"
        return Finding("all-reduce", where, "failed", f"{backend}, {processes} processes: {reason}", remedy)
    value = f"{backend}, {processes} processes: {min(speeds) / 1e9:,.2f} GB/s each"
    if on_gpus and min(speeds) < SLOW_GPUS:
        remedy = "check that NCCL uses NVLink and RDMA (NCCL_DEBUG=INFO), or shard over fewer nodes"
        return Finding("all-reduce", where, "warning", value, remedy)
    return Finding("all-reduce", where, "ok", value)


if __name__ == "__main__":
    print(all_reduce_bandwidth(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], device=int(sys.argv[1])))
