"""A task of SkyPilot that runs a recipe on several nodes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from minitron.errors import InputError
from minitron_platform.cluster.rendering.figures import Data, Nodes, check_image, check_name
from minitron_platform.cluster.rendering.templates import render


@dataclass(frozen=True)
class SkyPilot:
    """A task of SkyPilot."""

    name: str
    nodes: Nodes
    image: str
    data: Data
    recipe: str
    """YAML of the recipe."""
    gpu: str
    """Model of the GPUs, such as "H100"."""
    spot: bool


def skypilot_files(task: SkyPilot) -> dict[str, str]:
    """The task by its file name. Raises InputError for a value that SkyPilot would not take."""
    check_name(task.name)
    check_image(task.image)
    if task.nodes.gpus == 0:
        raise InputError("--gpus 0: SkyPilot looks for nodes by their GPUs", "give 1 or more")
    if task.data.is_folder:
        raise InputError(
            f"--storage {task.data.storage}: nodes of SkyPilot share no folder",
            "give an address such as s3://bucket/minitron",
        )
    if not re.fullmatch(r"[\w-]+", task.gpu, re.ASCII):
        raise InputError(f"--gpu {task.gpu}: not a name of a GPU", "`sky show-gpus` lists them")
    values = {
        "name": task.name,
        "nodes": task.nodes,
        "image": task.image,
        "environment": task.data.environment,
        "recipe": task.recipe,
        "gpu": task.gpu,
        "spot": task.spot,
    }
    return {f"{task.name}.yaml": render("skypilot/task.yaml.j2", values)}
