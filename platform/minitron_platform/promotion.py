"""`promote` for Python: promotes a version of a registered model."""

from __future__ import annotations

from pathlib import Path

from minitron.arguments import check_type
from minitron.errors import InputError
from minitron_platform.arguments import check_optional_string, path_string
from minitron_platform.locations import resolve_locations
from minitron_platform.tracking import registry

TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")  # of MLflow servers and databases


def promote(
    where: str | Path,
    model: str,
    *,
    version: str | int | None = None,
    alias: str = registry.CHAMPION,
    tracking_uri: str | None = None,
    unverified: bool = False,
) -> registry.Promotion:
    """Point `alias` at a version of `model` after verifying its weights; the same as `minitron promote`.

    where: the storage that the model was made in (a folder or an fsspec address, as `--storage`), or the address of MLflow's
    server or database. version: by default the one with the alias `candidate`. tracking_uri: MLflow's address, if `where` is a
    storage that does not contain MLflow's database. unverified: allow a version that does not say which weights were
    registered.
    Raises InputError for an unknown model or version and an invalid alias, StorageError for missing or altered weights.
    """
    where = path_string("where", where)
    if not where:
        raise InputError("where: the address is empty", "give the storage, such as 'runs', or MLflow's address")
    check_type("unverified", unverified, bool, "true or false")
    for name, value in (("model", model), ("alias", alias)):
        check_type(name, value, str, "a string")
    check_optional_string("tracking_uri", tracking_uri)
    if version is not None:
        check_type("version", version, (str, int), "a version, such as 3")
    if where.split("://")[0].split("+")[0] in TRACKING_SCHEMES:
        return registry.promote(where, model, version=_text(version), alias=alias, unverified=unverified)
    locations = resolve_locations(where, tracking_uri)
    return registry.promote(
        locations.tracking_uri,
        model,
        version=_text(version),
        alias=alias,
        storage_root=locations.storage,
        unverified=unverified,
    )


def _text(version: str | int | None) -> str | None:
    return None if version is None else str(version)
