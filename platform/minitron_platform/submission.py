"""A recipe as a Ray job: what travels is the recipe with absolute paths, the code, and where everything is kept."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from minitron import storage
from minitron.errors import InputError
from minitron_platform.addresses import is_loopback
from minitron_platform.cluster.jobs import submit_text
from minitron_platform.locations import resolve_locations
from minitron_platform.recipes.consistency import check_consistency
from minitron_platform.recipes.load import recipe_yaml, with_absolute_paths
from minitron_platform.recipes.schema import Recipe


def submit(
    recipe: Recipe,
    *,
    address: str,
    storage_path: str | None = None,
    tracking_uri: str | None = None,
    insecure: bool = False,
    take_over: bool = False,
    say: Callable[[str], None] | None = None,
) -> str:
    """Start `recipe` on the cluster at `address` (its Jobs address, http://HOST:8265) and return the submission id.

    storage_path: a folder that the cluster's nodes share, or an address such as s3://…; tracking_uri: MLflow's. On a head
    of this machine both have the defaults of `run`; elsewhere they must be given, because this machine's are not there.
    insecure: allow an unencrypted address elsewhere without a token. take_over: as in `run`.
    say: receives what there is to tell.
    Raises InputError for what cannot work, MinitronError if the head refuses or does not answer.
    """
    check_consistency(recipe)  # teacher and text may be where only the cluster can read them
    where = resolve_locations(storage_path, tracking_uri)
    options = {"storage": where.storage}
    if tracking_uri is None and not storage.is_local(where.storage):
        raise InputError(
            f"--tracking-uri: with storage at {where.storage} MLflow's default would be a file on the cluster's head",
            "give the address of an MLflow server",
        )
    if is_loopback(urlsplit(address).hostname or ""):
        options["tracking-uri"] = where.tracking_uri
    else:
        if storage_path is None:
            raise InputError(
                f"--storage: the default {where.storage} is on this machine, the cluster is at {address}",
                "give a folder that all its nodes share, or an address such as s3://bucket/minitron",
            )
        if tracking_uri is not None:
            options["tracking-uri"] = tracking_uri
    if take_over:
        options["take-over"] = ""
    text = recipe_yaml(with_absolute_paths(recipe))
    return submit_text(text, name=recipe.name, address=address, options=options, insecure=insecure, say=say)
