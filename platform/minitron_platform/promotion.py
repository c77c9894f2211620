"""Promoting a registered model from Python."""

from __future__ import annotations

from minitron.errors import InputError
from minitron_platform.locations import resolve_locations
from minitron_platform.tracking import registry

DATABASES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")  # that MLflow keeps a registry in


def promote(
    where: str,
    model: str,
    *,
    version: str | int | None = None,
    alias: str = registry.CHAMPION,
    tracking_uri: str | None = None,
) -> registry.Promotion:
    """Point `alias` at a version of `model`, by default the candidate, after its weights were verified: `minitron promote`.

    where: the storage that the model was made in, a folder or any fsspec address, as `--storage`; or MLflow's server or
    database. tracking_uri: MLflow's, if it is not in the storage.
    Raises InputError for an unknown model, version or alias, StorageError for weights that are missing or altered.
    """
    if not isinstance(where, str) or not where:
        raise InputError(f"where: {where!r}", "give the storage, such as 'runs', or MLflow's address")
    if where.split("://")[0].split("+")[0] in DATABASES:
        return registry.promote(where, model, version=_text(version), alias=alias)
    locations = resolve_locations(where, tracking_uri)
    return registry.promote(
        locations.tracking_uri, model, version=_text(version), alias=alias, storage_root=locations.storage
    )


def _text(version: str | int | None) -> str | None:
    return None if version is None else str(version)
