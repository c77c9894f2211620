"""A configuration of Ray's cluster launcher for AWS or Google Cloud."""

from __future__ import annotations

import re
from dataclasses import dataclass

from minitron.errors import InputError
from minitron_platform.cluster.rendering.figures import Data, Nodes, check_image, check_name
from minitron_platform.cluster.rendering.templates import ENVIRONMENT, render

MACHINES = {"aws": "p5.48xlarge", "gcp": "a3-highgpu-8g"}  # 8 H100 each
WORD = re.compile(r"[\w./:-]+", re.ASCII)


@dataclass(frozen=True)
class RayUp:
    """A cluster of `ray up`."""

    cloud: str
    """"aws" or "gcp"."""
    name: str
    nodes: Nodes
    image: str
    data: Data
    region: str
    machine: str | None = None
    """Type of the worker nodes; None for one with 8 H100."""
    zone: str | None = None
    """Google Cloud alone, as the next two."""
    project: str | None = None
    disk_image: str | None = None


def ray_up_files(cluster: RayUp) -> dict[str, str]:
    """The configuration by its file name. Raises InputError for values that are missing or that no cloud has."""
    check_name(cluster.name)
    check_image(cluster.image)
    machine = cluster.machine or MACHINES[cluster.cloud]
    if cluster.machine is None and cluster.nodes.gpus != 8:
        raise InputError(
            f"--gpus {cluster.nodes.gpus}: {machine}, the default, has 8 GPUs",
            "give the type of the nodes with --machine",
        )
    for_google = {"--zone": cluster.zone, "--project": cluster.project, "--disk-image": cluster.disk_image}
    for option, value in for_google.items():
        if (value is not None) != (cluster.cloud == "gcp"):
            verb = "is missing for" if value is None else "is not for"
            raise InputError(f"{option} {verb} --cloud {cluster.cloud}", "clusters/ray-up/README.md shows the commands")
    for option, value in {"--region": cluster.region, "--machine": machine, **for_google}.items():
        if value is not None and not WORD.fullmatch(value):
            raise InputError(f"{option} {value}: not a name of a cloud", "use letters, digits, . / : _ -")
    values = {
        "cloud": cluster.cloud,
        "name": cluster.name,
        "nodes": cluster.nodes,
        "image": cluster.image,
        "environment": {**ENVIRONMENT, **cluster.data.environment},
        "region": cluster.region,
        "zone": cluster.zone,
        "project": cluster.project,
        "disk_image": cluster.disk_image,
        "machine": machine,
    }
    return {f"{cluster.name}.yaml": render("ray-up/cluster.yaml.j2", values)}
