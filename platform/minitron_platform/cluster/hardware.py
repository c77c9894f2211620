"""The hardware that a run computes on, for its record and its report."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from minitron import storage
from minitron.device import datasheet_flops, processor
from minitron_platform.cluster.room import cluster_nodes, cores
from minitron_search.nodes import gpus_of

FILE = "hardware.json"
_TYPE = "accelerator_type:"  # how Ray names the resource that says which GPUs a node has


@dataclass(frozen=True)
class Hardware:
    """What a run computes on."""

    text: str
    gpus: int
    gpu_flops: float | None
    """FLOP/s of a GPU in bfloat16 by its data sheet; None on CPUs and for a GPU that is not known."""

    def write(self, folder: str) -> None:
        """Write the hardware into a run's folder."""
        storage.write_json(storage.join(folder, FILE), asdict(self))

    @classmethod
    def read(cls, folder: str) -> Hardware | None:
        """The hardware of a run; None if it is not known, as of runs of earlier versions."""
        match storage.read_json_if_exists(storage.join(folder, FILE)):
            case {"text": str(text), "gpus": int(gpus), "gpu_flops": float() | int() | None as flops}:
                return cls(text, gpus, flops)
        return None


def machine() -> Hardware:
    """This machine."""
    gpus = torch.cuda.device_count()
    if not gpus:
        return Hardware(f"{cores()} CPU cores, {processor()}", 0, None)
    return Hardware(f"{gpus} x {processor()}", gpus, datasheet_flops(torch.bfloat16))


def cluster() -> Hardware:
    """The connected Ray cluster."""
    nodes = cluster_nodes()
    gpus = gpus_of(nodes)
    types = sorted({name.removeprefix(_TYPE) for node in nodes for name in node if name.startswith(_TYPE)})
    cpus = sum(int(node.get("CPU", 0)) for node in nodes)
    text = f"{len(nodes)} Ray nodes, {cpus} CPUs" + (f", {gpus} x {', '.join(types) or 'GPU'}" if gpus else "")
    flops = datasheet_flops(torch.bfloat16, f"NVIDIA {types[0]}") if gpus and len(types) == 1 else None
    return Hardware(text, gpus, flops)
