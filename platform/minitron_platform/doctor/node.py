"""What a node says about itself. Runs on every node of a cluster."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from minitron import storage
from minitron.errors import MinitronError, one_line
from minitron_platform.cluster.probe import environment
from minitron_platform.cluster.requirements import Environment
from minitron_platform.program_output import program_output

SHARED_MEMORY = "/dev/shm"
PROBE_BYTES = 16 << 20  # written to the storage and read again
COMMAND_SECONDS = 20


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi lists it."""

    name: str
    driver: str
    memory_bytes: int


@dataclass(frozen=True)
class StorageSpeed:
    """A test of the storage from a node: a file is written, read and deleted."""

    error: str = ""
    """Problem and remedy; empty if the storage works."""
    shared: bool = True
    """Whether the node sees what another one has written."""
    write_bytes: float = 0.0
    """Per second."""
    read_bytes: float = 0.0
    """Per second; a local disk may answer from the main memory."""


@dataclass(frozen=True)
class NodeFacts:
    """A node's software, limits and hardware."""

    node: str
    """Its host name."""
    environment: Environment
    open_files: int
    """That a process may have."""
    shared_memory_bytes: int | None
    """Size of /dev/shm; None if there is none."""
    temp_folder: str
    temp_free_bytes: int
    gpus: tuple[Gpu, ...]
    torch_gpus: int
    """GPUs that PyTorch can use."""
    visible_gpus: str | None
    """CUDA_VISIBLE_DEVICES, which limits them; None if it is not set."""
    rdma: tuple[str, ...]
    """Network devices with remote direct memory access."""
    nvlink: bool | None
    """Whether all GPUs of the node are connected by NVLink; None with fewer than two, or without nvidia-smi."""
    storage: StorageSpeed


def node_facts(storage_root: str, mark: str) -> NodeFacts:
    """The facts of this node. mark: address of a file in the storage that another node has written; empty for none."""
    import torch

    temp = tempfile.gettempdir()
    gpus = _gpus()
    return NodeFacts(
        node=socket.gethostname(),
        environment=Environment.read(environment()),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shared_memory_bytes=_size(SHARED_MEMORY),
        temp_folder=temp,
        temp_free_bytes=shutil.disk_usage(temp).free,
        gpus=gpus,
        torch_gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        visible_gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
        rdma=tuple(sorted(each.name for each in Path("/sys/class/infiniband").glob("*"))),
        nvlink=_nvlink() if len(gpus) > 1 else None,
        storage=_storage_speed(storage_root, mark),
    )


def _storage_speed(root: str, mark: str) -> StorageSpeed:
    path = storage.join(root, f".doctor-{uuid4().hex}")
    content = os.urandom(PROBE_BYTES)
    try:
        shared = not mark or storage.exists(mark)
        started = time.perf_counter()
        storage.write_bytes(path, content)
        written = time.perf_counter()
        same = storage.read_bytes(path) == content
        read = time.perf_counter()
        storage.remove(path)
    except (MinitronError, OSError) as error:
        return StorageSpeed(error=one_line(error))
    if not same:
        return StorageSpeed(error="a file reads differently from how it was written; check the disk or the file system")
    return StorageSpeed(
        shared=shared, write_bytes=PROBE_BYTES / (written - started), read_bytes=PROBE_BYTES / (read - written)
    )


def _size(folder: str) -> int | None:
    try:
        return shutil.disk_usage(folder).total
    except OSError:
        return None


def _gpus() -> tuple[Gpu, ...]:
    query = "--query-gpu=name,driver_version,memory.total"
    lines = _nvidia_smi(query, "--format=csv,noheader,nounits").splitlines()
    rows = [[part.strip() for part in line.split(",")] for line in lines if line.count(",") == 2]
    return tuple(Gpu(name, driver, int(size) << 20) for name, driver, size in rows if size.isdigit())  # MiB


def _nvlink() -> bool | None:
    rows = [line.split() for line in _nvidia_smi("topo", "-m").splitlines() if line.startswith("GPU")]
    links = [cell for number, row in enumerate(rows) for cell in row[1 : len(rows) + 1] if cell != "X"]
    return all(cell.startswith("NV") for cell in links) if links else None


def _nvidia_smi(*arguments: str) -> str:
    return program_output("nvidia-smi", *arguments, seconds=COMMAND_SECONDS)
