"""MLflow's model registry: register models, promote them, roll back, and list them.

The weights of a version stay where they were written, in a folder that `minitron.storage` committed, and the version has its
path; the SHA-256 of the folder's manifest is the tag `minitron.manifest_sha256`. A tracking server does not accept paths on
another machine, so for a server local weights are uploaded as an MLflow logged model. An alias is only moved to a version whose
weights pass verification; its earlier versions are in the registered model's tag `minitron.history.<alias>`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from minitron.arguments import short_repr
from minitron.environment import environment_variables
from minitron.errors import InputError, MinitronError, StorageError
from minitron.storage import (
    MANIFEST,
    absolute,
    exists,
    is_committed,
    is_local,
    join,
    local_path,
    manifest,
    read_bytes,
    redact,
    verify,
)
from minitron_platform.tracking.alias_history import HISTORY_TAG, earlier_versions, moves_of
from minitron_platform.tracking.aliases import check_alias
from minitron_platform.tracking.check import check_database
from minitron_platform.tracking.flusher import create_database, prepare_mlflow, sqlite_path
from minitron_platform.tracking.version_weights import (
    CARD,
    MANIFEST_TAG,
    check_weights,
    copy_weights,
    location,
    uploaded_sizes,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

# followed by a benchmark's name; the value is its score, such as "acc 47.5 ± 4.6 % (0-shot, all 570 documents of test)"
TASK_TAG = "minitron.task."
HISTORY_KEPT = 500  # promotions; a tag of MLflow has at most 100,000 characters
DELETED = "Deleted_Internal"  # the stage of versions that were deleted, in MLflow's database
CANDIDATE = "candidate"
CHAMPION = "champion"
# Uploads of several gigabytes take long; prepare_mlflow gives other requests a timeout of seconds.
UPLOADING = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1800", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5"}


@dataclass(frozen=True)
class Promotion:
    """An alias and the version that it points at now."""

    name: str
    version: str
    alias: str
    previous: str | None
    """The version that it pointed at before; None if it is new."""


@dataclass(frozen=True)
class ModelRow:
    """One registered version. Values that are not recorded for the version are None."""

    name: str
    version: str
    aliases: tuple[str, ...]
    created: datetime
    parameters: int | None
    heldout_loss: float | None
    """Nats per token."""
    heldout_kl: float | None
    """To the teacher, nats per token."""
    tasks: dict[str, str]
    """Scores by benchmark, as text such as "acc 47.5 ± 4.6 %"."""
    source: str
    """Folder of the weights, or MLflow's address of an uploaded model."""
    run_id: str | None
    """Of the MLflow run that registered it."""


def register(
    tracking_uri: str,
    *,
    name: str,
    source: str,
    run_id: str | None,
    tags: dict[str, str],
    description: str = "",
    alias: str = CANDIDATE,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Register the weights in the folder `source` as a version of the model `name` and set `alias`; returns the version.

    The same weights are registered only once: another call returns the existing version after updating its tags, and does not
    move the alias if there is a newer version.
    run_id: of the MLflow run that the version belongs to. progress: called with (bytes uploaded, total bytes) during an upload.
    Raises InputError for a name or alias that MLflow does not allow, StorageError if `source` is not a committed folder or is
    incomplete, and MinitronError if the registry does not answer.
    """
    _check_name(name)
    _check_alias(alias)
    source = absolute(source)
    if not is_committed(source):
        raise StorageError(f"{source}: has no {MANIFEST}", "give a folder of weights that minitron wrote")
    verify(source, hashes=False)
    tags = {**tags, MANIFEST_TAG: _sha256(read_bytes(join(source, MANIFEST)))}
    with _registry(tracking_uri, create=True) as client:
        if not any(model.name == name for model in _registered(client)):
            _create_registered(client, name)
        versions = _versions(client, name)
        existing = _same_weights(versions, tags[MANIFEST_TAG])
        if existing:
            version = str(existing[0].version)
            for tag in (tag for tag in tags if existing[0].tags.get(tag) != str(tags[tag])):
                client.set_model_version_tag(name, version, tag, tags[tag])
            if description and existing[0].description != description:
                client.update_model_version(name, version, description)
        else:
            model_id = None
            if tracking_uri.startswith("http") and is_local(source):
                model_id = _upload(client, name, source, run_id, tags, progress)
            address = source if model_id is None else f"models:/{model_id}"
            created = client.create_model_version(
                name, address, run_id=run_id, tags=tags, description=description, model_id=model_id
            )
            version = str(created.version)
            first = str(_same_weights(_versions(client, name), tags[MANIFEST_TAG])[0].version)
            if first != version:  # another process registered the same weights at the same moment
                client.delete_model_version(name, version)
                version = first
        if all(int(other.version) <= int(version) for other in versions):
            _set_alias(client, name, alias, version)
    return version


def _set_alias(client: MlflowClient, name: str, alias: str, version: str) -> None:
    """Point an alias at a version, also if another process creates the alias at the same moment."""
    from mlflow.exceptions import MlflowException

    try:
        client.set_registered_model_alias(name, alias, version)
    except MlflowException as error:
        if (
            error.error_code != "BAD_REQUEST"
        ):  # MLflow's code for a row that another process has inserted since it looked
            raise
        client.set_registered_model_alias(name, alias, version)


def _same_weights(versions: list[Any], manifest_sha256: str) -> list[Any]:
    """The versions with this manifest, oldest first."""
    same = [version for version in versions if version.tags.get(MANIFEST_TAG) == manifest_sha256]
    return sorted(same, key=lambda version: int(version.version))


def promote(
    tracking_uri: str,
    name: str,
    *,
    version: str | None = None,
    alias: str = CHAMPION,
    storage_root: str | None = None,
    unverified: bool = False,
) -> Promotion:
    """Point `alias` at a version after comparing the content of its weights with what was registered.

    version: by default the version with the alias `candidate`. storage_root: current location of the storage, in case it was
    moved after the weights were registered. unverified: allow a version whose tag with the SHA-256 of the registered weights is
    missing; anybody who can write to the registry can delete it.
    Raises InputError for an alias that MLflow does not allow and for an unknown model or version, StorageError for a missing or
    altered file of the weights, MinitronError if the registry does not answer.
    """
    _check_alias(alias)
    with _registry(tracking_uri) as client:
        model = _model(client, name)
        if version is None:
            version = _aliased_version(model, CANDIDATE)
        return _move(client, model, str(version), alias, storage_root, unverified=unverified)


def rollback(tracking_uri: str, name: str, *, alias: str = CHAMPION, storage_root: str | None = None) -> Promotion:
    """Point `alias` back at its previous version after verifying the weights. Can be repeated.

    If the alias's version was deleted, the one before it is the previous version. Raises InputError if there is none, and what
    promote() raises.
    """
    with _registry(tracking_uri) as client:
        model = _model(client, name)
        moves = moves_of(model, alias)
        # MLflow removes an alias together with its version
        current = "" if alias not in model.aliases and moves else _aliased_version(model, alias)
        existing = {str(version.version) for version in _versions(client, name)}
        earlier = earlier_versions(moves, current)
        for deleted in [version for version in earlier if version not in existing]:
            log.warning("%s version %s was deleted, and is left out", name, deleted)
        earlier = [version for version in earlier if version in existing and version != current]
        if not earlier:
            raise InputError(
                f"model {name!r}: {alias!r} points at version {current or 'none'} and has no previous version",
                f"choose a version with: minitron promote {name} --version N"
                + (f" --alias {alias}" if alias != CHAMPION else ""),
            )
        return _move(client, model, earlier[-1], alias, storage_root, rolled_back=True)


def has_version(tracking_uri: str, name: str, version: str) -> bool:
    """Whether the registry has a version. If it does not answer, a warning is logged and the result is True."""
    database = sqlite_path(tracking_uri)
    if database is not None and not database.exists():
        return False  # opening it would create the file
    if database is not None and _is_listed(database, name, version):
        return True
    from mlflow.exceptions import MlflowException

    try:
        with _registry(tracking_uri) as client:
            try:
                client.get_model_version(name, version)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return False
    except MinitronError as error:
        log.warning("cannot check whether %s version %s is registered: %s", name, version, error.problem)
    return True


def _is_listed(database: Path, name: str, version: str) -> bool:
    """Whether a SQLite database lists a version that was not deleted. False also for one that cannot be read: MLflow, whose
    import takes seconds, is asked then."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as store:
            found = store.execute(
                "SELECT 1 FROM model_versions WHERE name = ? AND version = ? AND current_stage <> ?",
                (name, int(version), DELETED),
            )
            return found.fetchone() is not None
    except (sqlite3.Error, ValueError):
        return False


def models(tracking_uri: str, storage_root: str | None = None) -> list[ModelRow]:
    """All registered versions, sorted by name, then newest first. storage_root: as for `promote`.

    Raises MinitronError if the registry does not answer.
    """
    database = sqlite_path(tracking_uri)
    if database is not None and not database.exists():
        return []
    rows = []
    with _registry(tracking_uri) as client:
        for model in _registered(client):
            for version in sorted(_versions(client, model.name), key=lambda version: -int(version.version)):
                rows.append(
                    ModelRow(
                        name=model.name,
                        version=str(version.version),
                        aliases=tuple(sorted(a for a, v in model.aliases.items() if str(v) == str(version.version))),
                        created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
                        parameters=None if (size := _number(version, "minitron.parameters")) is None else round(size),
                        heldout_loss=_number(version, "minitron.heldout_loss"),
                        heldout_kl=_number(version, "minitron.heldout_kl"),
                        tasks={
                            tag.removeprefix(TASK_TAG): text
                            for tag, text in sorted(version.tags.items())
                            if tag.startswith(TASK_TAG)
                        },
                        source=location(version, storage_root),
                        run_id=version.run_id or None,
                    )
                )
    return rows


def _move(
    client: MlflowClient,
    model: Any,
    version: str,
    alias: str,
    storage_root: str | None,
    *,
    rolled_back: bool = False,
    unverified: bool = False,
) -> Promotion:
    """Verify a version's weights, point the alias at it, and record that in the history of the alias."""
    check_weights(client, _version(client, model.name, version), storage_root, unverified=unverified)
    current = model.aliases.get(alias)
    previous = None if current is None else str(current)
    if previous != version:
        entry = {"version": version, "time": datetime.now(UTC).isoformat(timespec="seconds"), "previous": previous}
        history = [*moves_of(model, alias), {**entry, "rollback": True} if rolled_back else entry][-HISTORY_KEPT:]
        # In this order the alias can still be rolled back to the right version if the process is killed in between.
        if rolled_back:
            client.set_registered_model_tag(model.name, HISTORY_TAG + alias, json.dumps(history))
        _set_alias(client, model.name, alias, version)
        if not rolled_back:
            client.set_registered_model_tag(model.name, HISTORY_TAG + alias, json.dumps(history))
    return Promotion(model.name, version, alias, previous)


def pull(
    tracking_uri: str,
    name: str,
    target: str,
    *,
    version: str | None = None,
    alias: str = CHAMPION,
    storage_root: str | None = None,
    unverified: bool = False,
) -> str:
    """Copy the weights of a version to the folder `target`, after comparing their content with what was registered; returns
    the version.

    version: by default the version that `alias` points at. storage_root, unverified: as for `promote`. Raises InputError for
    an unknown model, version or alias and for a folder that is not empty, StorageError for altered or missing weights.
    """
    if is_local(target) and local_path(target).exists() and any(local_path(target).iterdir()):
        raise InputError(f"{target}: there are files in it", "give a new folder")
    with _registry(tracking_uri) as client:
        model = _model(client, name)
        version = version or _aliased_version(model, alias)
        copy_weights(client, _version(client, name, version), storage_root, target, unverified=unverified)
        return version


def _version(client: MlflowClient, name: str, version: str) -> Any:
    """A registered version. Raises InputError if there is none of that number."""
    existing = {str(each.version): each for each in _versions(client, name)}
    if version not in existing:
        known = ", ".join(sorted(existing, key=int)) or "none"
        raise InputError(f"model {name!r} has no version {version!r}", f"choose one of: {known}")
    return existing[version]


def _upload(
    client: MlflowClient,
    name: str,
    source: str,
    run_id: str | None,
    tags: dict[str, str],
    progress: Callable[[int, int], None] | None,
) -> str:
    """Upload a committed folder as a logged model, its manifest last; returns the model's id.

    Files that an earlier call uploaded before it was interrupted are not uploaded again.
    """
    experiment = client.get_run(run_id).info.experiment_id if run_id else "0"
    models = client.search_logged_models([experiment], f"tags.`{MANIFEST_TAG}` = '{tags[MANIFEST_TAG]}'")
    model = models[0] if models else client.create_logged_model(experiment, name, source_run_id=run_id, tags=tags)
    if str(model.status) != "READY":
        files = {file: int(entry["bytes"]) for file, entry in manifest(source)["files"].items()}
        total = sum(files.values())
        done = 0
        uploaded = uploaded_sizes(client, model.model_id)
        with environment_variables(UPLOADING):
            card = [(CARD, -1)] if exists(join(source, CARD)) and CARD not in files else []
            for file, size in [*files.items(), *card, (MANIFEST, -1)]:
                if uploaded.get(file) != size:
                    client.log_model_artifact(
                        model.model_id, str(local_path(source) / file), os.path.dirname(file) or None
                    )
                done += max(size, 0)
                if progress is not None:
                    progress(done, total)
        client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


@contextmanager
def _registry(tracking_uri: str, *, create: bool = False) -> Iterator[MlflowClient]:
    """A client of the registry. create: whether a SQLite database that does not exist is created.

    Raises InputError for values that MLflow rejects and for a database that does not exist, MinitronError if the registry does
    not answer.
    """
    database = sqlite_path(tracking_uri)
    if database is not None and not create and not database.is_file():
        raise InputError(
            f"{database}: there is no MLflow database", "check the storage and MLflow's address, or run a recipe"
        )
    prepare_mlflow(tracking_uri)
    remedy = "check that the server is running and that the address is correct"
    try:
        check_database(tracking_uri)
    except ConnectionError as error:
        raise MinitronError(f"MLflow at {redact(tracking_uri)}: {redact(str(error))}", remedy) from error
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
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise MinitronError(f"MLflow at {redact(tracking_uri)}: {redact(reason)}", remedy) from error


def _check_name(name: str) -> None:
    """Raise InputError for a model name that MLflow does not allow."""
    if not name or any(character in name for character in "/:'\"`"):
        raise InputError(f"model name {name!r} is not allowed", "use a name without slashes, colons or quotes")


def _check_alias(alias: str) -> None:
    """Raise InputError for an alias that MLflow does not allow."""
    try:
        check_alias(alias)
    except ValueError as error:
        raise InputError(f"alias {alias!r} is not allowed: {error}", "choose another one, such as champion") from error


def _create_registered(client: MlflowClient, name: str) -> None:
    """Create a registered model, unless another process does at the same moment."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _model(client: MlflowClient, name: str) -> Any:
    """A registered model. Raises InputError if there is none of that name."""
    known = {model.name: model for model in _registered(client)}
    if name not in known:
        remedy = f"choose one of: {', '.join(sorted(known))}"
        if not known:
            remedy = "no model is registered there: check the storage and MLflow's address, or run a recipe first"
        raise InputError(f"no model {name!r} is registered", remedy)
    return known[name]


def _aliased_version(model: Any, alias: str) -> str:
    """The version that an alias points at. Raises InputError if the model has no such alias."""
    if alias not in model.aliases:
        known = ", ".join(f"{name} (version {version})" for name, version in sorted(model.aliases.items()))
        raise InputError(
            f"model {model.name!r} has no alias {alias!r}",
            f"its aliases are: {known or 'none'}; or name a version with --version",
        )
    return str(model.aliases[alias])


def _registered(client: MlflowClient) -> list[Any]:
    return _all_pages(lambda token: client.search_registered_models(order_by=["name ASC"], page_token=token))


def _versions(client: MlflowClient, name: str) -> list[Any]:
    # MLflow's filters cannot contain every name that it accepts
    condition = f"name = '{name}'" if re.fullmatch(r"[\w .-]+", name) else None
    versions = _all_pages(lambda token: client.search_model_versions(condition, page_token=token))
    return [version for version in versions if version.name == name]


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


def _number(version: Any, tag: str) -> float | None:
    """The number in a tag; None, with a warning, for one that somebody else has written."""
    text = version.tags.get(tag)
    try:
        number = None if text is None else float(text)
    except ValueError:
        number = math.nan
    if number is not None and not math.isfinite(number):
        log.warning(
            "%s version %s: the tag %s is not a number: %s", version.name, version.version, tag, short_repr(text)
        )
        return None
    return number


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
