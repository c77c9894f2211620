"""`submit`: runs a recipe as a Ray job on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from minitron import storage
from minitron.errors import InputError
from minitron_platform.addresses import check_jobs_address, is_loopback
from minitron_platform.cluster.jobs import submit_text, to_stderr
from minitron_platform.locations import resolve_locations
from minitron_platform.planning.submission_checks import check_submission
from minitron_platform.recipes.load import check_recipe_type, recipe_yaml
from minitron_platform.recipes.paths import with_absolute_paths
from minitron_platform.recipes.schema import Recipe
from minitron_platform.tracking.flusher import check_address
from minitron_platform.uploads import with_uploads


def submit(
    recipe: Recipe,
    *,
    address: str,
    storage_path: str | Path | None = None,
    tracking_uri: str | None = None,
    insecure: bool = False,
    take_over: bool = False,
    upload: bool = False,
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
    resume: the command that submits it again, which the job prints when it is stopped.
    say: receives messages for the user, one line at a time. Default: standard error.

    Raises what `plan` raises for a recipe that cannot work, before anything is sent. What depends on the cluster (its memory,
    disk and GPUs) and what this machine cannot read is checked by the job; `say` receives a line about the latter.
    Raises InputError for an invalid address or location, MinitronError if the head refuses or does not answer.
    """
    check_recipe_type(recipe)
    check_jobs_address(address)
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
    if is_loopback(urlsplit(address).hostname or ""):
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
    recipe = with_uploads(recipe, locations.storage, say) if upload else recipe
    text = recipe_yaml(with_absolute_paths(recipe))
    return submit_text(
        text, name=recipe.name, address=address, options=options, resume=resume, insecure=insecure, say=say
    )
