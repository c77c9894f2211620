"""A configuration of Ray's cluster launcher for AWS or Google Cloud."""

from __future__ import annotations

import re
from dataclasses import dataclass

from minitron.errors import InputError
from minitron_platform.cluster.rendering.figures import Data, Nodes, check_image, check_name
from minitron_platform.cluster.rendering.templates import ENVIRONMENT, render

MACHINES = {"aws": "p5.48xlarge", "gcp": "a3-highgpu-8g"}  # 8 H100 each
REGIONS = {"aws": re.compile(r"[a-z]{2}(-[a-z]+)+-\d"), "gcp": re.compile(r"[a-z]+-[a-z]+\d+")}
EXAMPLES = {"aws": "us-east-1", "gcp": "us-central1"}
AMI = re.compile(r"ami-[0-9a-f]{8,17}")
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
    disk_image: str
    """Image of all nodes' disks, with NVIDIA's driver and docker: an AMI at AWS. Ray's own default is too old for an H100."""
    machine: str | None = None
    """Type of the worker nodes; None for one with 8 H100."""
    zone: str | None = None
    """Google Cloud alone, as the next one."""
    project: str | None = None


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
    if cluster.cloud == "aws" and not AMI.fullmatch(cluster.disk_image):
        raise InputError(
            f"--disk-image {cluster.disk_image}: not an AMI",
            "give the id of one with NVIDIA's driver and docker, ami-…",
        )
    if not REGIONS[cluster.cloud].fullmatch(cluster.region):
        raise InputError(
            f"--region {cluster.region}: not a region of {cluster.cloud}", f"give one such as {EXAMPLES[cluster.cloud]}"
        )
    for_google = {"--zone": cluster.zone, "--project": cluster.project}
    for option, value in for_google.items():
        if (value is not None) != (cluster.cloud == "gcp"):
            verb = "is missing for" if value is None else "is not for"
            raise InputError(f"{option} {verb} --cloud {cluster.cloud}", "clusters/ray-up/README.md shows the commands")
    if cluster.zone is not None and not re.fullmatch(rf"{cluster.region}-[a-z]", cluster.zone):
        raise InputError(
            f"--zone {cluster.zone}: not a zone of the region {cluster.region}", f"give one such as {cluster.region}-a"
        )
    if cluster.data.is_folder:
        raise InputError(
            f"--storage {cluster.data.storage}: nodes of `ray up` share no folder",
            "give an address such as s3://bucket/minitron",
        )
    names = {"--machine": machine, "--disk-image": cluster.disk_image, "--project": cluster.project}
    for option, value in names.items():
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
