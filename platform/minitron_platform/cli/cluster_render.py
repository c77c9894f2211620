"""The command `minitron cluster render`: writes the files that start a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minitron.errors import InputError
from minitron_platform.console import echo

if TYPE_CHECKING:
    from minitron_platform.cluster.rendering.figures import Nodes

IMAGE_HELP = "Container image with Minitron, with its tag or digest; clusters/docker builds one."
STORAGE_HELP = "Address for all results, or a folder that all nodes share."
TRACKING_HELP = "Address of MLflow's server."


@click.group()
def render() -> None:
    """Print the files that start a cluster, or write them with --out.

    They have your figures, the version of Ray that is installed here, a token, and a head without GPUs. You can edit them. The
    pages in clusters/ say when to use which, how to start it and how to end it.
    """


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorated


_name = click.option("--name", default="minitron", show_default=True, metavar="NAME", help="Name of the cluster.")
_nodes = _options(
    click.option("--nodes", "count", type=int, required=True, metavar="N", help="Number of worker nodes."),
    click.option("--gpus", type=int, required=True, metavar="N", help="GPUs of each of them."),
    click.option("--cpus", type=int, metavar="N", help="CPUs of each. [default: 10 for each GPU]"),
    click.option("--memory", type=int, metavar="GIB", help="Memory of each, GiB. [default: 192 for each GPU]"),
)
_image = click.option("--image", required=True, metavar="IMAGE", help=IMAGE_HELP)
_data = _options(
    click.option("--storage", metavar="PATH", envvar="MINITRON_STORAGE", help=STORAGE_HELP),
    click.option("--tracking-uri", metavar="URI", envvar="MLFLOW_TRACKING_URI", help=TRACKING_HELP),
)
_overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe."
)
_out = click.option("--out", metavar="FOLDER", help="Write the files into this folder. [default: print them]")


@render.command()
@_name
@_nodes
@_image
@_data
@click.option("--claim", metavar="NAME", help="PersistentVolumeClaim (ReadWriteMany) to mount at --storage.")
@click.option(
    "--recipe", metavar="RECIPE", help="Run this recipe as a RayJob. [default: a RayCluster, for `minitron submit`]"
)
@_overrides
@click.option("--queue", metavar="NAME", help="Local queue of Kueue, which admits all nodes together.")
@click.option(
    "--redis", metavar="HOST:PORT", help="Redis for the head's state, so that a head that is lost comes back."
)
@click.option(
    "--fabric", type=click.Choice(["efa", "rdma"]), help="Network adapters of the nodes for NCCL. [default: none]"
)
@click.option("--node-label", "labels", multiple=True, metavar="KEY=VALUE", help="Label of the nodes for the workers.")
@_out
def kuberay(
    name: str,
    count: int,
    gpus: int,
    cpus: int | None,
    memory: int | None,
    image: str,
    storage: str | None,
    tracking_uri: str | None,
    claim: str | None,
    recipe: str | None,
    overrides: tuple[str, ...],
    queue: str | None,
    redis: str | None,
    fabric: str | None,
    labels: tuple[str, ...],
    out: str | None,
) -> None:
    """Manifests for Kubernetes with KubeRay: a RayCluster, or with --recipe a RayJob.

    They need two secrets; clusters/kuberay/README.md shows the commands.
    """
    from minitron_platform.cluster.rendering.figures import data, nodes
    from minitron_platform.cluster.rendering.kuberay import KubeRay, kuberay_files

    workers = nodes(count, gpus, cpus, memory)
    files = kuberay_files(
        KubeRay(
            name=name,
            nodes=workers,
            image=image,
            data=data(storage, tracking_uri, runs=recipe is not None),
            claim=claim,
            queue=queue,
            redis=redis,
            fabric=fabric,
            node_labels=dict(_pair(label) for label in labels),
            recipe=_recipe_text(recipe, overrides, workers),
        )
    )
    _give(files, out)


@render.command()
@_name
@_nodes
@_data
@click.option("--recipe", metavar="RECIPE", required=True, help="Recipe to run; a file must be where all nodes see it.")
@_overrides
@click.option(
    "--time",
    default="24:00:00",
    show_default=True,
    metavar="TIME",
    help="Limit of the job, after which it is requeued.",
)
@click.option("--partition", metavar="NAME", help="Partition of the job. [default: Slurm's]")
@click.option("--account", metavar="NAME", help="Account of the job. [default: Slurm's]")
@_out
def slurm(
    name: str,
    count: int,
    gpus: int,
    cpus: int | None,
    memory: int | None,
    storage: str | None,
    tracking_uri: str | None,
    recipe: str,
    overrides: tuple[str, ...],
    time: str,
    partition: str | None,
    account: str | None,
    out: str | None,
) -> None:
    """A script for sbatch that runs a recipe on several nodes.

    It starts and stops its own Ray, and requeues itself when it is preempted or its time is over.
    """
    from minitron_platform.cluster.rendering.figures import data, nodes
    from minitron_platform.cluster.rendering.slurm import Slurm, slurm_files

    workers = nodes(count, gpus, cpus, memory)
    _recipe_text(recipe, overrides, workers)  # raises what `run` would raise
    job = Slurm(
        name=name,
        nodes=workers,
        data=data(storage, tracking_uri, runs=True),
        recipe=str(Path(recipe).absolute()) if Path(recipe).is_file() else recipe,
        overrides=overrides,
        memory=memory,
        time=time,
        partition=partition,
        account=account,
    )
    _give(slurm_files(job), out)


@render.command()
@click.option("--cloud", type=click.Choice(["aws", "gcp"]), required=True, help="Amazon's or Google's.")
@click.option("--region", required=True, metavar="NAME", help="Region of the cloud.")
@_name
@_nodes
@_image
@_data
@click.option("--machine", metavar="TYPE", help="Machine type of the workers. [default: p5.48xlarge or a3-highgpu-8g]")
@click.option("--zone", metavar="NAME", help="Google Cloud: zone of the nodes.")
@click.option("--project", metavar="NAME", help="Google Cloud: your project.")
@click.option(
    "--disk-image",
    required=True,
    metavar="NAME",
    help="Image of the nodes' disks, with NVIDIA's driver and docker; at AWS an AMI.",
)
@_out
def ray_up(
    cloud: str,
    region: str,
    name: str,
    count: int,
    gpus: int,
    cpus: int | None,
    memory: int | None,
    image: str,
    storage: str | None,
    tracking_uri: str | None,
    machine: str | None,
    zone: str | None,
    project: str | None,
    disk_image: str,
    out: str | None,
) -> None:
    """A configuration for `ray up` at AWS or Google Cloud.

    Nodes with GPUs start when a run needs them. Runs are started with `minitron submit`.
    """
    from minitron_platform.cluster.rendering.figures import data, nodes
    from minitron_platform.cluster.rendering.ray_up import RayUp, ray_up_files

    cluster = RayUp(
        cloud=cloud,
        name=name,
        nodes=nodes(count, gpus, cpus, memory),
        image=image,
        data=data(storage, tracking_uri, runs=False),
        region=region,
        machine=machine,
        zone=zone,
        project=project,
        disk_image=disk_image,
    )
    _give(ray_up_files(cluster), out)


@render.command()
@_name
@_nodes
@_image
@_data
@click.option("--recipe", metavar="RECIPE", required=True, help="Recipe to run, which is written into the file.")
@_overrides
@click.option(
    "--gpu", default="H100", show_default=True, metavar="NAME", help="Model of the GPUs, as SkyPilot calls it."
)
@click.option("--spot", is_flag=True, help="Spot nodes.")
@_out
def skypilot(
    name: str,
    count: int,
    gpus: int,
    cpus: int | None,
    memory: int | None,
    image: str,
    storage: str | None,
    tracking_uri: str | None,
    recipe: str,
    overrides: tuple[str, ...],
    gpu: str,
    spot: bool,
    out: str | None,
) -> None:
    """A task for SkyPilot that runs a recipe on several nodes."""
    from minitron_platform.cluster.rendering.figures import data, nodes
    from minitron_platform.cluster.rendering.skypilot import SkyPilot, skypilot_files

    workers = nodes(count, gpus, cpus, memory)
    task = SkyPilot(
        name=name,
        nodes=workers,
        image=image,
        data=data(storage, tracking_uri, runs=True),
        recipe=_recipe_text(recipe, overrides, workers) or "",
        gpu=gpu,
        spot=spot,
    )
    _give(skypilot_files(task), out)


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise InputError(f"--node-label {text}: has no value", "give KEY=VALUE")
    return key, value


def _recipe_text(recipe: str | None, overrides: tuple[str, ...], workers: Nodes) -> str | None:
    """The whole recipe as YAML, as `submit` sends it, with warnings on standard error. Raises
    InputError for one whose trials or workers have no room."""
    if recipe is None:
        if overrides:
            raise InputError(f"--set {overrides[0]} without a recipe", "add --recipe, or leave it out")
        return None
    import torch

    from minitron.device import DTYPES
    from minitron_platform.cluster.room import checked_resources
    from minitron_platform.recipes.load import load_recipe, recipe_yaml
    from minitron_platform.recipes.paths import with_absolute_paths
    from minitron_platform.recipes.resources import gpu_warnings

    loaded = load_recipe(recipe, overrides)
    node = {"CPU": float(workers.cpus), "GPU": float(workers.gpus), "memory": float(workers.memory << 30)}
    nodes = [node] * workers.count
    resources = checked_resources(loaded, nodes)
    for warning in gpu_warnings(loaded, resources, nodes, DTYPES.get(loaded.teacher.dtype, torch.bfloat16)):
        click.echo(f"warning: {warning}", err=True)
    if resources.uses_gpus:
        from minitron_platform.planning.cluster import assumed_cluster
        from minitron_platform.planning.coming_nodes import missing_memory

        coming = assumed_cluster(workers.count * workers.gpus, workers.gpus)
        if lack := missing_memory(loaded, coming, workers.memory << 30):
            remedy = lack.remedy.replace("nodes with more main memory", "nodes with more main memory (--memory)")
            click.echo(f"warning: {lack.problem}; {remedy}", err=True)
    return recipe_yaml(with_absolute_paths(loaded))


def _give(files: dict[str, str], out: str | None) -> None:
    """Write the files, or print them as one."""
    if out is None:
        click.echo("---\n".join(files.values()), nl=False)
        return
    from minitron_platform.cluster.rendering.templates import write

    for path in write(files, out):
        echo(str(path))
