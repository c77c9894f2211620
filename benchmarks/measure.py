"""Helpers of the benchmarks: a clock, peak memory, tables, and a description of the machine."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from minitron.device import device, processor


def on_gpu() -> bool:
    return device().type == "cuda"


def seconds_now() -> float:
    """On a CPU the processor time of this process, which other work disturbs least; on a GPU wall time, after it is idle."""
    if not on_gpu():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def kind_of_seconds() -> str:
    return "wall time" if on_gpu() else f"processor time, {_threads()}"


def memory_now() -> int:
    """Bytes of GPU memory in tensors, or of resident memory without a GPU."""
    return torch.cuda.memory_allocated() if on_gpu() else _status("VmRSS")


def restart_peak() -> None:
    """Reset the peak of memory."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    return torch.cuda.max_memory_allocated() if on_gpu() else _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def machine() -> str:
    """The processor or GPU, and the version of torch."""
    name = processor() if on_gpu() else f"{processor()}, {os.cpu_count()} cores, {_threads()} each"
    return f"{name}; torch {torch.__version__}"


def _threads() -> str:
    count = torch.get_num_threads()
    return "one thread" if count == 1 else f"{count} threads"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, lowest and highest value, as text."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def markdown(title: str, rows: list[str], columns: list[dict[str, str]]) -> list[str]:
    """Lines of a table with a row for each name in `rows` (the name "" is the heading) and the values of `columns` by name."""
    lines = [f"{title}:", ""]
    for row in rows:
        lines.append("| " + " | ".join([row, *(column[row] for column in columns)]) + " |")
        if not row:
            lines.append("|---" * (len(columns) + 1) + "|")
    return lines
