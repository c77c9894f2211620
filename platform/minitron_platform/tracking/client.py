"""MLflow's model registry as it is read: its models, their versions and aliases."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from minitron.errors import InputError, MinitronError
from minitron.storage import redact
from minitron_platform.tracking.alias_lock import LOCK_PREFIX, unless_missing
from minitron_platform.tracking.aliases import check_alias
from minitron_platform.tracking.check import check_database
from minitron_platform.tracking.flusher import create_database, prepare_mlflow, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

SHOWN = 20  # names in an error


class RegistryError(MinitronError):
    """The registry does not answer, or not as it should; later it may."""


@contextmanager
def open_registry(tracking_uri: str, *, create: bool = False) -> Iterator[MlflowClient]:
    """A client of the registry. create: whether a SQLite database that does not exist is created.

    Raises InputError for values that MLflow rejects and for a database that does not exist, RegistryError if the registry does
    not answer.
    """
    database = sqlite_path(tracking_uri)
    if database is not None and not create and not database.is_file():
        raise InputError(
            f"{database}: there is no MLflow database", "check the storage and MLflow's address, or run a recipe"
        )
    prepare_mlflow(tracking_uri)
    remedy = "check that the server is running and that the address is correct"
    if database is not None:
        remedy = "check that this user can write the file and its folder, and that the disk is not full"
    try:
        check_database(tracking_uri)
    except ConnectionError as error:
        raise RegistryError(f"MLflow at {redact(tracking_uri)}: {redact(str(error))}", remedy) from error
    create_database(tracking_uri)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        yield MlflowClient(tracking_uri, registry_uri=tracking_uri)
    except MlflowException as error:
        if error.error_code == "INVALID_PARAMETER_VALUE":
            raise InputError(
                f"MLflow at {redact(tracking_uri)}: {redact(str(error))}", "change the value in the message"
            ) from error
        # SQLAlchemy's remark on when it sent a statement comes before what the database answered
        lines = [line for line in str(error).splitlines() if not line.startswith("(raised as a result of ")]
        reason = (lines or [type(error).__name__])[0][:300]
        raise RegistryError(f"MLflow at {redact(tracking_uri)}: {redact(reason)}", remedy) from error


def check_model_name(name: str) -> None:
    """Raise InputError for a model name that MLflow does not allow, or that no command could name again."""
    if not name or any(character in name for character in "/:@'\"`") or not name.isprintable():
        raise InputError(
            f"model name {name!r} is not allowed", "use a name without slashes, colons, quotes, @ or line breaks"
        )
    if name == "." or name.startswith(".."):
        raise InputError(f"model name {name!r} is not allowed", "use one that does not begin with dots")
    if name.startswith(LOCK_PREFIX):
        raise InputError(f"model name {name!r} is not allowed", f"use one that does not begin with {LOCK_PREFIX}")


def checked_alias(alias: str) -> None:
    """Raise InputError for an alias that MLflow does not allow."""
    try:
        check_alias(alias)
    except ValueError as error:
        raise InputError(f"alias {alias!r} is not allowed: {error}", "choose another one, such as champion") from error


def registered_model(client: MlflowClient, name: str) -> Any:
    """A registered model. Raises InputError if there is none of that name."""
    model = None if name.startswith(LOCK_PREFIX) else find_registered(client, name)
    if model is not None and model.name == name:  # some databases do not tell capitals from small letters
        return model
    known = [model.name for model in registered_models(client)]
    more = f" and {len(known) - SHOWN:,} more, see `minitron models`" if len(known) > SHOWN else ""
    remedy = f"choose one of: {', '.join(known[:SHOWN])}{more}"
    if not known:
        remedy = "no model is registered there: check the storage and MLflow's address, or run a recipe first"
    raise InputError(f"no model {name!r} is registered", remedy)


def find_registered(client: MlflowClient, name: str) -> Any | None:
    """A registered model, asked for by its name: a server may hold thousands of others. None if there is none."""
    return unless_missing(lambda: client.get_registered_model(name), None)


def registered_version(client: MlflowClient, name: str, version: str) -> Any:
    """A registered version. Raises InputError if there is none of that number."""
    existing = {str(each.version): each for each in versions_of(client, name)}
    if version not in existing:
        known = ", ".join(sorted(existing, key=int)) or "none"
        raise InputError(f"model {name!r} has no version {version!r}", f"choose one of: {known}")
    return existing[version]


def aliased_version(model: Any, alias: str) -> str:
    """The version that an alias points at. Raises InputError if the model has no such alias."""
    if alias not in model.aliases:
        known = ", ".join(f"{name} (version {version})" for name, version in sorted(model.aliases.items()))
        raise InputError(
            f"model {model.name!r} has no alias {alias!r}",
            f"its aliases are: {known or 'none'}; or name a version by its number",
        )
    return str(model.aliases[alias])


def version_named(client: MlflowClient, reference: str) -> Any:
    """The version that NAME@ALIAS or NAME/VERSION means; NAME alone is the champion, or the newest version without one.

    Raises InputError if there is none.
    """
    name, _, number = reference.partition("/")
    if number:
        return registered_version(client, registered_model(client, name).name, number)
    name, _, alias = reference.rpartition("@") if "@" in reference else (reference, "", "")
    model = registered_model(client, name)
    if alias or "champion" in model.aliases:
        return registered_version(client, name, aliased_version(model, alias or "champion"))
    versions = versions_of(client, name)
    if not versions:
        raise InputError(f"model {name!r} has no versions", "choose another model")
    return max(versions, key=lambda version: int(version.version))


def registered_models(client: MlflowClient) -> list[Any]:
    """All registered models, sorted by name."""
    models = _all_pages(lambda token: client.search_registered_models(order_by=["name ASC"], page_token=token))
    return [model for model in models if not model.name.startswith(LOCK_PREFIX)]


def versions_of(client: MlflowClient, name: str) -> list[Any]:
    """All versions of a model, in no order."""
    # MLflow's filters cannot contain every name that it accepts
    condition = f"name = '{name}'" if re.fullmatch(r"[\w .-]+", name) else None
    versions = _all_pages(lambda token: client.search_model_versions(condition, page_token=token))
    return [version for version in versions if version.name == name]


def all_versions(client: MlflowClient) -> list[Any]:
    """The versions of all models, sorted by name, then newest first."""
    # in this order no page lacks a version that is changed meanwhile
    order = ["name ASC", "version_number DESC"]
    return _all_pages(lambda token: client.search_model_versions(order_by=order, page_token=token))


def _all_pages(page: Callable[[str | None], Any]) -> list[Any]:
    """The rows of all pages. page: returns the page of a token, the first page for None."""
    rows: list[Any] = []
    token = None
    while True:
        current = page(token)
        rows.extend(current)
        token = current.token
        if not token:
            return rows
