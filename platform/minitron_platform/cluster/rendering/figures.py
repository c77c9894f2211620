"""What a user says about a cluster, checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from minitron.errors import InputError, MinitronError
from minitron.loopback import is_loopback
from minitron.storage import check_address, is_local, secret_in
from minitron_platform.tracking import flusher

NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # KubeRay appends up to 23 characters to it, and DNS allows 63
IMAGE = re.compile(r"[a-z0-9][\w.:/-]*(:[\w.-]+|@sha256:[0-9a-f]{64})", re.ASCII)
# Of a node with 8 H100 on AWS, GCP or Azure, less what the system takes, for each GPU
CPUS_PER_GPU = 10
GIB_PER_GPU = 192


@dataclass(frozen=True)
class Nodes:
    """The worker nodes, all alike."""

    count: int
    gpus: int
    """GPUs of each node; 0 for nodes that compute on their CPUs."""
    cpus: int
    """CPUs of each node."""
    memory: int
    """GiB of each node."""

    @property
    def object_store(self) -> int:
        """GiB of a node's memory for Ray's object store, which is in shared memory."""
        return max(1, self.memory // 8)

    @property
    def shared_memory(self) -> int:
        """GiB that /dev/shm may have: the object store, and as much again for NCCL."""
        return 2 * self.object_store


def nodes(count: int, gpus: int, cpus: int | None = None, memory: int | None = None) -> Nodes:
    """`count` nodes with `gpus` GPUs each, by default with CPUs and GiB of memory as such nodes have at AWS, GCP and Azure.

    Raises InputError for less than one node, CPU or GiB, for a negative number of GPUs, and for more than any cluster has.
    """
    if cpus is None:
        cpus = CPUS_PER_GPU * gpus or 4
    if memory is None:
        memory = GIB_PER_GPU * gpus or 16
    for option, value, lowest, highest in (
        ("--nodes", count, 1, 10_000),
        ("--gpus", gpus, 0, 128),
        ("--cpus", cpus, 1, 4096),
        ("--memory", memory, 4, 131_072),
    ):
        if not lowest <= value <= highest:
            few = "few" if value < lowest else "many"
            raise InputError(f"{option} {value}: too {few}", f"give {lowest:,} to {highest:,}")
    return Nodes(count, gpus, cpus, memory)


@dataclass(frozen=True)
class Data:
    """Where the cluster's processes keep their results."""

    storage: str | None = None
    """Address in an object store, or a folder that all nodes share."""
    tracking_uri: str | None = None
    """MLflow's server."""
    environment: dict[str, str] = field(default_factory=dict)
    """The environment variables that say so to `minitron`."""

    @property
    def is_folder(self) -> bool:
        """Whether the storage is a folder of the nodes."""
        return self.storage is not None and is_local(self.storage)


def data(storage: str | None, tracking_uri: str | None, *, runs: bool) -> Data:
    """Locations for all processes of a cluster. runs: whether a run starts with the cluster, which needs both.

    Raises InputError for a location that is none, that all nodes cannot reach, or that contains a secret.
    """
    for option, value in (("--storage", storage), ("--tracking-uri", tracking_uri)):
        if value is not None and (secret := secret_in(value)):
            raise InputError(
                f"{option}: the address contains {secret}, and the file would contain it too",
                "leave it out, and give it to the nodes as an environment variable from a secret",
            )
    if storage is not None:
        _check("--storage", check_address, storage)
    if tracking_uri is not None:
        _check("--tracking-uri", flusher.check_address, tracking_uri)
        _check_tracking(tracking_uri, storage)
    if storage is not None and is_local(storage) and not re.fullmatch(r"/[\w./-]+", storage, re.ASCII):
        raise InputError(
            f"--storage {storage}: not the absolute path of a folder",
            "give an address such as s3://bucket/minitron, or the path that a shared folder has on all nodes",
        )
    if runs and storage is None:
        raise InputError(
            "--storage is missing", "give an address such as s3://bucket/minitron, or a folder that all nodes share"
        )
    if runs and tracking_uri is None and not is_local(storage or ""):
        raise InputError(
            f"--tracking-uri is missing: with the storage {storage}, records would be in a file that is lost with the cluster",
            "give the address of an MLflow server",
        )
    environment = {"MINITRON_STORAGE": storage, "MLFLOW_TRACKING_URI": tracking_uri}
    return Data(storage, tracking_uri, {name: value for name, value in environment.items() if value is not None})


def _check(option: str, check: Callable[[str], None], value: str) -> None:
    """Call `check` with the value of an option, which its errors name."""
    try:
        check(value)
    except MinitronError as error:
        raise InputError(f"{option}: {error.problem}", error.remedy) from error


def _check_tracking(tracking_uri: str, storage: str | None) -> None:
    """Raise InputError for a server or a file of MLflow that only one machine has."""
    try:
        host = urlsplit(tracking_uri).hostname
    except ValueError as error:
        raise InputError(
            f"--tracking-uri {tracking_uri}: {error}", "give an address such as http://HOST:5000"
        ) from error
    if is_loopback(host):
        raise InputError(
            f"--tracking-uri {tracking_uri}: on a node of the cluster this is the node itself",
            "give the address at which all nodes reach the server",
        )
    if tracking_uri.startswith("sqlite") and not (storage and is_local(storage)):
        raise InputError(
            f"--tracking-uri {tracking_uri}: a file of one node, which is lost with the cluster",
            "give the address of an MLflow server",
        )


def check_name(name: str) -> str:
    """`name`, if it can be that of a cluster everywhere. Raises InputError otherwise."""
    if not NAME.fullmatch(name):
        raise InputError(
            f"--name {name}: not a name for a cluster",
            "use at most 40 of a-z 0-9 -, begin with a letter and do not end with -",
        )
    return name


def check_image(image: str) -> str:
    """`image`, if it is the name of a container image with a tag or digest. Raises InputError otherwise."""
    if not IMAGE.fullmatch(image) or "//" in image:
        raise InputError(
            f"--image {image}: not the name of an image with its tag or digest",
            "give it as registry.example.com/minitron:0.1, or with @sha256:…; clusters/docker builds one",
        )
    if image.endswith(":latest"):
        raise InputError(
            f"--image {image}: nodes that start later may get another image of this tag",
            "give a tag that does not move, or a digest",
        )
    return image
