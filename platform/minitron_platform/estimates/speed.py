"""The FLOP/s that models reach on this machine: measured once by `minitron doctor --calibrate`, or assumed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minitron.cache import cache_folder
from minitron.device import cores, matmul_flops, processor
from minitron.errors import MinitronError

EFFICIENCY = 0.5  # share of the measured speed of matrix products that small models are assumed to reach
FILE = "speed.json"  # in the cache folder


@dataclass(frozen=True)
class Speed:
    """FLOP/s of models on this machine: of one CPU core, or of one GPU."""

    forward: float
    """FLOP/s in forward passes."""
    training: float
    """FLOP/s in training steps."""
    matmul: float
    """FLOP/s in products of large matrices, on all cores."""
    measured: str = ""
    """When `minitron doctor --calibrate` measured it, such as "2026-11-26"; empty if it is assumed."""

    def of_stage(self, trains: bool, processes: float) -> float:
        """FLOP/s of a stage that trains or makes forward passes, with one core for each of `processes`."""
        each = self.training if trains else self.forward
        if torch.cuda.is_available():
            return each
        return each * max(1.0, min(processes, cores()))


def speed_here(dtype: torch.dtype) -> Speed:
    """The speed of this machine in `dtype`: the stored one, if it was measured on this machine, else an assumed one."""
    matmul = matmul_flops(dtype)
    stored = _read().get(_key(dtype))
    if stored is None:
        each = matmul * EFFICIENCY / (1 if torch.cuda.is_available() else cores())
        return Speed(each, each, matmul)
    return Speed(float(stored["forward"]), float(stored["training"]), matmul, str(stored["measured"]))


def store_speed(dtype: torch.dtype, speed: Speed) -> Path:
    """Keep the speed of this machine for later plans; returns the file."""
    file = cache_folder() / FILE
    content = {**_read(), _key(dtype): asdict(speed)}
    new = file.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(content, indent=2))
    new.replace(file)
    return file


def _key(dtype: torch.dtype) -> str:
    """What the speed depends on."""
    return f"{processor()} · {cores()} cores · torch {torch.__version__} · {str(dtype).removeprefix('torch.')}"


def _read() -> dict[str, dict[str, float | str]]:
    """The stored speeds by `_key`; none if the file does not exist or is not ours."""
    try:
        content = json.loads((cache_folder() / FILE).read_text())
    except (OSError, ValueError, MinitronError):
        return {}
    fields = ("forward", "training", "measured")
    valid = isinstance(content, dict) and all(
        isinstance(each, dict) and {*fields} <= {*each} for each in content.values()
    )
    return content if valid else {}
