"""The device on which models compute, its speed, and the dtype that suits it."""

from __future__ import annotations

import os
import platform
import time
from functools import lru_cache
from pathlib import Path

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# FLOP/s of dense bfloat16 products in NVIDIA's data sheets of November 2026 (newer ones print the double, "with sparsity"),
# by the beginning of the name that CUDA gives a GPU; a longer one comes first.
DATASHEET_FLOPS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
}


def device() -> torch.device:
    """The first GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(on: torch.device) -> None:
    """Wait for an accelerator, whose calls return before it has finished; without waiting only the launches would be timed."""
    if on.type != "cpu":
        torch.accelerator.synchronize(on)


def random_devices() -> list[int]:
    """The GPU whose random state this process uses, as torch.random.fork_rng takes it; by default that touches all GPUs."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def gpu_bytes() -> int:
    """Memory in bytes of the GPU with the least memory; 0 without a GPU."""
    count = torch.cuda.device_count()
    return min((int(torch.cuda.get_device_properties(number).total_memory) for number in range(count)), default=0)


def compute_capability() -> tuple[int, int] | None:
    """The lowest CUDA compute capability of the GPUs; None without a GPU."""
    return min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())), default=None)


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name() -> str:
    """The model name of `device()`; for a CPU also the number of torch threads."""
    cuda = device().type == "cuda"
    return processor() if cuda else f"{processor()} · threads {torch.get_num_threads()}"


def processor() -> str:
    """The model name of `device()`, without the number of threads."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def compute_dtype(name: str = "auto") -> torch.dtype:
    """The dtype of this name in `DTYPES`; "auto": bfloat16 if the hardware multiplies it natively, else float32."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if torch.cuda.is_available() or _cpu_has_bfloat16() else torch.float32


@lru_cache
def matmul_flops(dtype: torch.dtype) -> float:
    """FLOP/s of products of large square matrices of `dtype` on `device()`, measured once per process for 0.2 s."""
    target = device()
    size = 8192 if target.type == "cuda" else 1024
    # random values: a GPU needs less power for equal ones, and computes them faster than any training's
    a = torch.randn(size, size, dtype=dtype, device=target, generator=torch.Generator(target).manual_seed(0))
    a @ a
    started = time.perf_counter()
    rounds = 0
    while time.perf_counter() - started < 0.2:
        a @ a
        rounds += 1
        if a.is_cuda:
            torch.cuda.synchronize()
    return rounds * 2 * size**3 / (time.perf_counter() - started)


def datasheet_flops(dtype: torch.dtype, name: str = "") -> float | None:
    """FLOP/s of `dtype` by the data sheet of the device of this name, by default `device()`; None if it is not in
    `DATASHEET_FLOPS`, has another dtype, or is a part of a GPU (MIG)."""
    name = name or processor()
    if dtype != torch.bfloat16 or "MIG" in name:
        return None
    return next((flops for beginning, flops in DATASHEET_FLOPS.items() if name.startswith(beginning)), None)


def _cpu_has_bfloat16() -> bool:
    # Without these instructions a CPU emulates bfloat16, many times slower than float32.
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16 "))
