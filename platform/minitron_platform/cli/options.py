"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

STORAGE_HELP = "Folder or fsspec address for all results. [default: ./runs]"
TRACKING_HELP = "Address of MLflow's server or database. [default: SQLite in the storage]"
ADDRESS_HELP = "Address of the cluster's Ray Jobs API: http://HOST:8265."
INSECURE_HELP = "Allow an unencrypted address of another machine."
UPLOAD_HELP = (
    "Copy the recipe's local teacher, texts and benchmarks to the storage first, for nodes that do not have them."
)
TAKE_OVER_HELP = "If another driver is running this recipe, take the run over instead of waiting."
UNVERIFIED_HELP = "Allow a version that does not say which weights were registered."


def tracking_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options for the location of MLflow; the command gets them as `locations`."""

    @click.option("--storage", "storage_path", metavar="PATH", envvar="MINITRON_STORAGE", help=STORAGE_HELP)
    @click.option("--tracking-uri", metavar="URI", envvar="MLFLOW_TRACKING_URI", help=TRACKING_HELP)
    @wraps(function)
    def wrapped(storage_path: str | None, tracking_uri: str | None, **rest: Any) -> Any:
        from minitron_platform.locations import resolve_locations

        return function(locations=resolve_locations(storage_path, tracking_uri), **rest)

    return wrapped


def check_out(path: str | None) -> None:
    """Raise InputError for a file of --out that cannot be written, before the work whose results it gets."""
    from minitron import storage
    from minitron.errors import InputError, StorageError

    if path is None:
        return
    try:
        storage.check_file_writable(path)
    except StorageError as error:  # the remedy is another file, not another --storage
        raise InputError(f"--out {error.problem}", error.remedy) from error


def recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The recipe argument, with the options of every command that reads one."""
    options = [
        click.argument("recipe"),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override a key of the recipe: --set distill.steps=50.",
        ),
        click.option("--storage", "storage_path", metavar="PATH", envvar="MINITRON_STORAGE", help=STORAGE_HELP),
        click.option("--tracking-uri", metavar="URI", envvar="MLFLOW_TRACKING_URI", help=TRACKING_HELP),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def known_stage(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Check the name of a stage. The stages are imported only here, because they import large libraries."""
    if value is None:
        return None
    from minitron_platform.stages.order import stage_names

    return str(click.Choice(stage_names()).convert(value, option, context))


def job_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command about submitted jobs."""
    for option in (
        click.option("--insecure", is_flag=True, help=INSECURE_HELP),
        click.option("--address", required=True, metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help=ADDRESS_HELP),
    ):
        function = option(function)
    return function
