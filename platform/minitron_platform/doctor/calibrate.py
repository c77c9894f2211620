"""Measures this machine's speed for `minitron plan`, and keeps it."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import torch

from minitron.device import cores, matmul_flops
from minitron.errors import MinitronError
from minitron_platform.doctor import measure_speed
from minitron_platform.estimates.speed import Speed, store_speed

CPU_PROCESSES = 2  # at a time, as a run has by default: cores share caches and memory


def calibrate(dtype: torch.dtype) -> Speed:
    """Measure the speed of models in `dtype` on this machine, which takes about a minute, and store it.

    Raises MinitronError if the measurement fails.
    """
    count = 1 if torch.cuda.is_available() else min(CPU_PROCESSES, cores())
    command = [sys.executable, "-m", measure_speed.__name__, str(dtype).removeprefix("torch.")]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(count)
    ]
    try:
        outputs = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            reason = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise MinitronError(f"the speed of this machine could not be measured: {reason}", "see `minitron doctor`")
    measured = [json.loads(output.strip().splitlines()[-1]) for output, _ in outputs]
    forward, training = (sum(each[name] for each in measured) / count for name in ("forward", "training"))
    speed = Speed(forward, training, matmul_flops(dtype), time.strftime("%Y-%m-%d"))
    store_speed(dtype, speed)
    return speed
