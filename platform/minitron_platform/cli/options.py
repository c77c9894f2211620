"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

STORAGE_HELP = "Folder or fsspec address for all results. [default: ./runs]"
TRACKING_HELP = "Address of MLflow's server or database. [default: SQLite in the storage]"


def tracking_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options for the location of MLflow; the command gets them as `locations`."""

    @click.option("--storage", "storage_path", metavar="PATH", envvar="MINITRON_STORAGE", help=STORAGE_HELP)
    @click.option("--tracking-uri", metavar="URI", envvar="MLFLOW_TRACKING_URI", help=TRACKING_HELP)
    @wraps(function)
    def wrapped(storage_path: str | None, tracking_uri: str | None, **rest: Any) -> Any:
        from minitron_platform.locations import resolve_locations

        return function(locations=resolve_locations(storage_path, tracking_uri), **rest)

    return wrapped
