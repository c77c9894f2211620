"""The device on which models compute, its speed, and the dtype that suits it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Datasheet(NamedTuple):
    """What the data sheet of a GPU says."""

    bfloat16_flops: float
    """FLOP/s of dense bfloat16 products; newer data sheets print the double, "with sparsity"."""
    float32_flops: float
    """FLOP/s in float32, which torch multiplies in unless TF32 is allowed."""
    memory: int
    """Bytes. CUDA shows a few percent more, because NVIDIA's gigabytes are not all decimal."""


# NVIDIA's data sheets of November 2026, by the beginning of the name that CUDA or Ray gives a GPU; a longer one comes first.
# Of a GPU that was sold with two sizes of memory under one name, the smaller has an entry of its own if its name has the size.
DATASHEETS = {
    "NVIDIA H100 PCIe": Datasheet(756e12, 51e12, 80_000_000_000),
    "NVIDIA H100 NVL": Datasheet(835e12, 60e12, 94_000_000_000),
    "NVIDIA H100": Datasheet(989e12, 67e12, 80_000_000_000),
    "NVIDIA H200 NVL": Datasheet(835e12, 60e12, 141_000_000_000),
    "NVIDIA H200": Datasheet(989e12, 67e12, 141_000_000_000),
    "NVIDIA GH200": Datasheet(989e12, 67e12, 96_000_000_000),
    "NVIDIA B200": Datasheet(2250e12, 75e12, 180_000_000_000),
    "NVIDIA GB200": Datasheet(2500e12, 80e12, 186_000_000_000),
    "NVIDIA A100-SXM4-40GB": Datasheet(312e12, 19.5e12, 40_000_000_000),
    "NVIDIA A100-PCIE-40GB": Datasheet(312e12, 19.5e12, 40_000_000_000),
    "NVIDIA A100-40G": Datasheet(312e12, 19.5e12, 40_000_000_000),
    "NVIDIA A100": Datasheet(312e12, 19.5e12, 80_000_000_000),
    "NVIDIA L40S": Datasheet(362e12, 91.6e12, 48_000_000_000),
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


def on_this_gpu() -> Callable[[], None] | None:
    """For a new thread to call: it then uses the GPU that this thread uses, and takes no memory on the node's first one."""
    return partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_available() else None


def values_of(tensor: Tensor) -> list[float]:
    """The values of a tensor [n], for which the host waits.

    On a GPU they are copied to pinned memory, and an event is waited for: while the driver waits itself, with a copy to other
    memory, no other thread of the process can copy anything to the GPU.
    """
    if not tensor.is_cuda:
        return list(tensor.tolist())
    copy = tensor.to("cpu", non_blocking=True)
    torch.cuda.current_stream(tensor.device).record_event().synchronize()
    return list(copy.tolist())


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


def datasheet(name: str) -> Datasheet | None:
    """The data sheet of the GPU of this name, with or without "NVIDIA" and in any case; None if it is not in `DATASHEETS`, or
    is a part of a GPU (MIG)."""
    full = "nvidia " + name.lower().removeprefix("nvidia ")
    if "mig" in full.split():
        return None
    return next((sheet for beginning, sheet in DATASHEETS.items() if full.startswith(beginning.lower())), None)


def datasheet_flops(dtype: torch.dtype, name: str = "") -> float | None:
    """FLOP/s of `dtype` by the data sheet of the device of this name, by default `device()`; None if `datasheet` knows none, or
    if the dtype is not bfloat16."""
    sheet = datasheet(name or processor()) if dtype == torch.bfloat16 else None
    return sheet and sheet.bfloat16_flops


def _cpu_has_bfloat16() -> bool:
    # Without these instructions a CPU emulates bfloat16, many times slower than float32.
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16 "))
