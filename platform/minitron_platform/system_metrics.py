"""Load of the driver's machine during a run, for the page "System metrics" of its MLflow run.

They go through the run's records like all other metrics, under the names of MLflow's own monitor, which would send them by
itself: it loses them while the server is away, and asks it for the run at each sample. On a cluster, Ray exports those of all
nodes for Prometheus.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from minitron.errors import one_line

log = logging.getLogger(__name__)

SECONDS = 10.0  # between two samples
FIRST_SECONDS = 1.0  # until the first


@contextmanager
def system_metrics(record: Callable[[dict[str, float], int], None]) -> Iterator[None]:
    """Call `record` with the metrics and the Unix time in seconds, every ten seconds inside the block, from a thread."""
    ended = threading.Event()
    thread = threading.Thread(target=_sample, args=(record, ended), name="minitron-system", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _sample(record: Callable[[dict[str, float], int], None], ended: threading.Event) -> None:
    psutil.cpu_percent()  # it is that since the last call
    gpus = list(_gpus())
    before = psutil.net_io_counters()
    pause = FIRST_SECONDS
    while not ended.wait(pause):
        pause = SECONDS
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
            "network_receive_megabytes": (network.bytes_recv - before.bytes_recv) / 1e6,
            "network_transmit_megabytes": (network.bytes_sent - before.bytes_sent) / 1e6,
        }
        for number, gpu in enumerate(gpus):
            values |= {f"gpu_{number}_{name}": value for name, value in _gpu_values(gpu).items()}
        record({f"system/{name}": round(value, 1) for name, value in values.items()}, int(time.time()))


def _gpus() -> Iterator[Any]:
    """NVML's handles of this machine's GPUs; none, with a warning, if its library does not answer."""
    if not torch.cuda.is_available():
        return
    import pynvml

    try:
        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            yield pynvml.nvmlDeviceGetHandleByIndex(number)
    except pynvml.NVMLError as error:
        log.warning("GPUs are missing in the system metrics: %s", one_line(error))


def _gpu_values(gpu: Any) -> dict[str, float]:
    import pynvml

    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        return {
            "utilization_percentage": pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
            "memory_usage_megabytes": memory.used / 1e6,
            "memory_usage_percentage": 100 * memory.used / memory.total,
            "power_usage_watts": pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        }
    except pynvml.NVMLError:  # a virtual GPU does not say all of them
        return {}
