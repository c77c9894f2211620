"""Objects of Kubernetes for a RayCluster, or for a RayJob that runs a recipe on a cluster of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from minitron.errors import InputError
from minitron_platform.cluster.rendering.figures import Data, Nodes, check_image, check_name
from minitron_platform.cluster.rendering.templates import ENVIRONMENT, render

LABEL = re.compile(r"[\w./-]+", re.ASCII)


@dataclass(frozen=True)
class KubeRay:
    """A cluster of KubeRay."""

    name: str
    nodes: Nodes
    image: str
    data: Data
    claim: str | None = None
    """PersistentVolumeClaim that is mounted at the storage's path."""
    queue: str | None = None
    """Kueue's local queue."""
    redis: str | None = None
    """HOST:PORT for the state of Ray's head."""
    fabric: str | None = None
    """Network adapters for NCCL, "efa" or "rdma"."""
    node_labels: Mapping[str, str] = field(default_factory=dict)
    """Labels of the nodes that workers may run on."""
    recipe: str | None = None
    """YAML of the recipe that a RayJob runs; None for a RayCluster."""


def kuberay_files(cluster: KubeRay) -> dict[str, str]:
    """Manifests by file name. Raises InputError for a value that Kubernetes would not take."""
    check_name(cluster.name)
    check_image(cluster.image)
    _check(cluster)
    values = {
        "name": cluster.name,
        "nodes": cluster.nodes,
        "image": cluster.image,
        "storage": cluster.data.storage,
        "environment": {**ENVIRONMENT, **cluster.data.environment},
        "claim": cluster.claim,
        "queue": cluster.queue,
        "redis": cluster.redis,
        "fabric": cluster.fabric,
        "node_labels": dict(cluster.node_labels),
        "recipe": cluster.recipe,
    }
    names = ["cluster"] if cluster.recipe is None else ["recipe", "job"]
    return {
        f"{name}.yaml": render(f"kuberay/{name}.yaml.j2", values)
        for name in ("network-policy", "disruption-budget", *names)
    }


def _check(cluster: KubeRay) -> None:
    if cluster.data.is_folder != (cluster.claim is not None):
        raise InputError(
            f"--storage {cluster.data.storage} with --claim {cluster.claim}: a folder needs a claim, and an object store none",
            "give --storage /mnt/minitron --claim NAME, or --storage s3://bucket/minitron alone",
        )
    for option, value in (("--claim", cluster.claim), ("--queue", cluster.queue)):
        if value is not None and not re.fullmatch(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?", value):
            raise InputError(f"{option} {value}: not a name of Kubernetes", "use a-z 0-9 - .")
    if cluster.redis is not None:
        address = re.fullmatch(r"[\w.-]+:(\d{1,5})", cluster.redis, re.ASCII)
        if not address or not 0 < int(address[1]) < 1 << 16:
            raise InputError(f"--redis {cluster.redis}: not an address", "give HOST:PORT, with a port of 1 to 65535")
    if cluster.fabric is not None and cluster.nodes.gpus == 0:
        raise InputError(f"--fabric {cluster.fabric} on nodes without GPUs", "leave it out")
    for key, value in cluster.node_labels.items():
        if not LABEL.fullmatch(key) or not LABEL.fullmatch(value):
            raise InputError(f"--node-label {key}={value}: not a label of Kubernetes", "give KEY=VALUE")
