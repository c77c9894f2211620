"""`submit`: runs a recipe as a Ray job on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from minitron import storage
from minitron.errors import InputError
from minitron.loopback import is_loopback
from minitron_platform.addresses import check_jobs_address
from minitron_platform.cluster.job_check import DEPENDENCIES, Dependencies
from minitron_platform.cluster.job_start import JobNeeds, checked, submit_text, to_stderr
from minitron_platform.cluster.requirements import extras_for
from minitron_platform.cluster.room import checked_resources
from minitron_platform.locations import resolve_locations
from minitron_platform.planning.submission_checks import check_submission
from minitron_platform.recipes.build import all_text_sources
from minitron_platform.recipes.load import check_recipe_type, recipe_yaml
from minitron_platform.recipes.paths import with_absolute_paths
from minitron_platform.recipes.schema import Recipe
from minitron_platform.tracking.flusher import check_address
from minitron_platform.uploads import check_uploads, local_inputs, with_uploads


def submit(
    recipe: Recipe,
    *,
    address: str,
    storage_path: str | Path | None = None,
    tracking_uri: str | None = None,
    insecure: bool = False,
    take_over: bool = False,
    upload: bool = False,
    env: Dependencies = "image",
    driver_cpus: float = 0.0,
    driver_memory: int = 0,
    resume: str = "",
    say: Callable[[str], None] | None = None,
) -> str:
    """Start `recipe` as a job on a Ray cluster and return the submission id.

    Only the recipe and the code are sent. Local paths in the recipe are made absolute; they must exist on the cluster's nodes,
    unless `upload` is set.

    address: of the cluster's Jobs API, http://HOST:8265. For a head on this machine storage_path and tracking_uri have the
    defaults of `run`; for another cluster they are required, because these defaults are on this machine.
    storage_path: a folder that the cluster's nodes share, or an address such as s3://bucket/minitron.
    tracking_uri: MLflow's server or database.
    insecure: allow an unencrypted address of another machine.
    take_over: as for `run`.
    upload: copy the recipe's local teacher, texts and benchmark documents to the storage first, for nodes that do not have
        them.
    env: where the job's packages come from: "image" if the cluster's nodes have them, "uv" if those that they lack are
        installed for the job, in the versions that this machine has. Both compare the cluster's Ray, Python and packages with
        what Minitron needs, by a job that takes seconds. "as-is" submits without looking.
    driver_cpus, driver_memory: CPUs and bytes of memory that the job's command reserves, which then runs on a node that has
        them; without both it runs on the head.
    resume: the command that submits it again, which the job prints when it is stopped.
    say: receives messages for the user, one line at a time. Default: standard error.

    Raises what `plan` raises for a recipe that cannot work, and InputError for a cluster whose environment cannot run it,
    before anything is sent, or for one that is too small for its workers or trials. What else depends on the cluster (its
    memory and disk) and what this machine cannot read is checked by the job; `say` receives a line about the latter.
    Raises InputError for an invalid address or location, MinitronError if the head refuses or does not answer.
    """
    check_recipe_type(recipe)
    check_jobs_address(address)
    if env not in DEPENDENCIES:
        raise InputError(f"env: {env!r}", f"use one of {', '.join(DEPENDENCIES)}")
    say = say or to_stderr
    locations = resolve_locations(storage_path, tracking_uri)
    options = {"storage": locations.storage}
    if tracking_uri is None and not storage.is_local(locations.storage):
        raise InputError(
            f"--tracking-uri: with storage at {locations.storage}, the default would be a file on the cluster's head",
            "give the address of an MLflow server",
        )
    if tracking_uri is not None:
        check_address(tracking_uri)
    if is_loopback(urlsplit(address).hostname):
        options["tracking-uri"] = locations.tracking_uri
    else:
        if storage_path is None:
            raise InputError(
                f"--storage: the default {locations.storage} is on this machine, but the cluster is at {address}",
                "give a folder that all its nodes share, or an address such as s3://bucket/minitron",
            )
        if tracking_uri is not None:
            options["tracking-uri"] = tracking_uri
    if take_over:
        options["take-over"] = ""
    if unchecked := check_submission(recipe):
        say(f"this machine cannot read {', '.join(unchecked)}; the job will check it")
    if upload:
        check_uploads(recipe)
    elif not is_loopback(urlsplit(address).hostname) and (local := local_inputs(recipe)):
        say(
            f"note: {', '.join(local)} on this machine: every node of the cluster must have the same at that path; "
            "--upload copies it to the storage"
        )
    addresses = [
        locations.storage,
        tracking_uri or "",
        *(source.path for source in all_text_sources(recipe.data).values()),
    ]
    needs = JobNeeds(env, tuple(extras_for(addresses)), driver_cpus, driver_memory)
    needs = checked(needs, address=address, insecure=insecure, say=say, check_room=partial(checked_resources, recipe))
    recipe = with_uploads(recipe, locations.storage, say) if upload else recipe
    text = recipe_yaml(with_absolute_paths(recipe))
    return submit_text(
        text,
        name=recipe.name,
        address=address,
        options=options,
        needs=needs,
        resume=resume,
        insecure=insecure,
        say=say,
    )
