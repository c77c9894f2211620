"""Checks a cluster's Ray, Python and packages before a run is submitted to it, and chooses what the run brings."""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import requires
from pathlib import Path
from shutil import copy
from typing import Any, Literal, get_args

from packaging.requirements import Requirement
from ray.job_submission import JobSubmissionClient

from minitron.errors import InputError, MinitronError
from minitron_platform.cluster import probe
from minitron_platform.cluster.brought import Brought
from minitron_platform.cluster.job_rows import ENDED
from minitron_platform.cluster.requirements import PROJECT, Environment, lacks, pins, python_lack
from minitron_search import nodes
from minitron_search.nodes import Node

Dependencies = Literal["image", "uv", "as-is"]
DEPENDENCIES: tuple[Dependencies, ...] = get_args(Dependencies)
CHECK_SECONDS = 90.0  # longest wait for the cluster to run the check


def packages_to_bring(
    client: JobSubmissionClient,
    dependencies: Dependencies,
    extras: Iterable[str],
    entrypoint_resources: Mapping[str, Any],
    say: Callable[[str], None],
    check_room: Callable[[Sequence[Node]], object],
) -> Brought:
    """The packages that a job must install on the cluster.

    dependencies: "image" if the packages of the cluster's nodes are used, "uv" if those that they lack are installed for the
    job, in the versions that this machine has, "as-is" if nothing is checked. extras: of Minitron, that the run needs.
    entrypoint_resources: arguments of Ray's submit_job that choose the node of the job's command, which is the one that is
    checked. check_room: called with the cluster's nodes, and those that it may start; raises InputError where they have no
    room for the job's work.

    Raises InputError if the cluster cannot run the job, MinitronError if it does not run the check.
    """
    if dependencies == "as-is":
        return Brought()
    _check_ray(client)
    there = _environment_of(client, entrypoint_resources)
    if needed := python_lack(there):
        raise InputError(
            f"the cluster has Python {there.python}, and Minitron needs {needed}",
            "start it from an image with that Python",
        )
    if there.nodes:
        check_room([dict(node) for node in there.nodes])
    missing = lacks(there, extras)
    if not missing:
        return Brought()
    if dependencies == "image":
        raise InputError(
            f"the cluster's environment cannot run Minitron: {'; '.join(map(str, missing))}",
            "install them on its nodes, or let the job bring them with --env uv; --env as-is submits without this check",
        )
    brought = pins(missing, there)
    say(f"the job installs on its nodes, with what these need there: {' '.join(brought)}")
    return Brought.beside(there, brought)


def _check_ray(client: JobSubmissionClient) -> None:
    """Raise InputError for a cluster with a Ray that this code does not run with."""
    there = client._do_request("GET", "/api/version").json().get("ray_version", "")
    needed = next(each for each in map(Requirement, requires(PROJECT) or ()) if each.name == "ray").specifier
    if not needed.contains(there, prereleases=True):
        raise InputError(
            f"the cluster has Ray {there}, and Minitron needs {needed}", "start the cluster with a Ray in this range"
        )


def _environment_of(client: JobSubmissionClient, entrypoint_resources: Mapping[str, Any]) -> Environment:
    """The environment in which the cluster runs the command of a job, by a job that prints it."""
    with tempfile.TemporaryDirectory(prefix="minitron-check-") as folder:
        copy(probe.__file__, folder)
        copy(nodes.__file__, folder)
        job = client.submit_job(
            submission_id=f"minitron-check-{uuid.uuid4().hex[:8]}",
            entrypoint=f"python {Path(probe.__file__).name}",
            runtime_env={"working_dir": folder},
            metadata={"minitron.check": "environment"},
            **entrypoint_resources,
        )
    try:
        deadline = time.monotonic() + CHECK_SECONDS
        while (state := client.get_job_status(job).value) not in ENDED:
            if time.monotonic() > deadline:
                raise MinitronError(
                    f"the cluster has not run the check of its environment within {CHECK_SECONDS:g} s: it is still "
                    f"{state.lower()}",
                    "look at the cluster's free resources (`ray status` there), or submit without the check: --env as-is",
                )
            time.sleep(0.1)
        log = client.get_job_logs(job)
    except BaseException:
        client.stop_job(job)
        raise
    with suppress(RuntimeError):  # it stays in the list of jobs
        client.delete_job(job)
    line = next((line for line in log.splitlines() if line.startswith(probe.MARK)), None)
    if line is None:
        raise MinitronError(
            f"the cluster's `python` does not run: {log.strip()[-500:] or client.get_job_info(job).message}",
            "put the Python with Ray first in the PATH of the cluster's nodes",
        )
    return Environment.read(json.loads(line.removeprefix(probe.MARK)))
