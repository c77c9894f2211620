"""A script for Slurm that runs a recipe on several nodes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from minitron.errors import InputError
from minitron_platform.cluster.rendering.figures import Data, Nodes, check_name
from minitron_platform.cluster.rendering.templates import render

TIME = re.compile(r"\d+-([01]?\d|2[0-3])(:[0-5]\d){0,2}|\d{1,3}(:[0-5]\d){1,2}|\d+")
NOTICE = 240  # seconds for a checkpoint


@dataclass(frozen=True)
class Slurm:
    """A job of Slurm."""

    name: str
    nodes: Nodes
    data: Data
    recipe: str
    """Name of a shipped recipe, or path of one that all nodes see."""
    overrides: Sequence[str]
    """`--set` arguments."""
    memory: int | None
    """GiB of each node; None for all of it."""
    time: str
    """Limit in Slurm's form, such as "24:00:00"."""
    partition: str | None = None
    account: str | None = None


def slurm_files(job: Slurm) -> dict[str, str]:
    """The script by its file name. Raises InputError for a value that Slurm would not take."""
    check_name(job.name)
    if not TIME.fullmatch(job.time) or not re.search("[1-9]", job.time):
        raise InputError(
            f"--time {job.time}: not a time of Slurm, or none at all",
            "give it as HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES",
        )
    for option, value in (("--partition", job.partition), ("--account", job.account)):
        if value is not None and not re.fullmatch(r"[\w.,-]+", value, re.ASCII):
            raise InputError(f"{option} {value}: not a name of Slurm", "use letters, digits, _ . -")
    words = [job.recipe, *(word for override in job.overrides for word in ("--set", override))]
    values = {
        "name": job.name,
        "nodes": job.nodes,
        "memory": "0" if job.memory is None else f"{job.memory}G",
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "notice": NOTICE,
        "environment": job.data.environment,
        "arguments": shlex.join(words),
    }
    return {f"{job.name}.sbatch": render("slurm/minitron.sbatch.j2", values)}
