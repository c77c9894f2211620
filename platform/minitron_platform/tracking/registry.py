"""The family in MLflow's model registry: register, promote, roll back, list.

A version points at weights that stay where they were written, a folder committed by `minitron.storage`; the SHA-256 of
its manifest is the tag `minitron.manifest_sha256`. A tracking server refuses folders of another machine, so there they
are uploaded as an MLflow logged model. An alias never moves to weights that do not verify, and where it pointed before
is kept in the registered model's tag `minitron.history.<alias>`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.environment import environment_variables
from minitron.errors import InputError, MinitronError, StorageError
from minitron.names import check_name
from minitron.storage import MANIFEST, absolute, is_committed, is_local, join, local_path, manifest, read_bytes, verify
from minitron_platform.tracking.aliases import check_alias
from minitron_platform.tracking.check import check_database
from minitron_platform.tracking.flusher import create_database, prepare_mlflow, redact, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

MANIFEST_TAG = "minitron.manifest_sha256"
HISTORY_TAG = "minitron.history."
PATH_TAG = "minitron.storage_path"  # of the weights, below the root of the storage
TASK_TAG = "minitron.task."  # and the benchmark's name: its score in words, such as "acc 47.5 ± 4.6 %"
HISTORY_KEPT = 500  # promotions; MLflow's tags hold 100,000 characters
CANDIDATE, CHAMPION = "candidate", "champion"
# Files of gigabytes take long to store; prepare_mlflow lets other requests wait for seconds only.
UPLOADING = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1800", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5"}


@dataclass(frozen=True)
class Promotion:
    """An alias that moved: `previous` is the version it pointed at before, None for the first."""

    name: str
    version: str
    alias: str
    previous: str | None


@dataclass(frozen=True)
class ModelRow:
    """One registered version; numbers are None where the version has no such tag."""

    name: str
    version: str
    aliases: tuple[str, ...]
    created: datetime
    parameters: int | None
    heldout_loss: float | None
    heldout_kl: float | None
    tasks: dict[str, str]  # scores in words by benchmark
    source: str
    run_id: str | None


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
    """Register the weights at `source` as a version of `name` under `alias`; returns the version.

    The same weights are one version of a name, whoever registers them and however often: a second call returns it, with its
    tags brought up to date, and leaves the alias alone if a newer version has been registered meanwhile.
    progress: (bytes uploaded, bytes), only for an upload.
    Raises InputError for a name or alias that the registry does not take, before anything is made there, StorageError where
    `source` is not a committed folder or is incomplete, and MinitronError, as every function here, where the registry is
    away.
    """
    _check_name(name)
    _check_alias(alias)
    source = absolute(source)
    if not is_committed(source):
        raise StorageError(f"{source}: no {MANIFEST}", "give a folder of weights that minitron wrote")
    verify(source, hashes=False)
    tags = {**tags, MANIFEST_TAG: _sha256(read_bytes(join(source, MANIFEST)))}
    with _registry(tracking_uri) as client:
        if not any(model.name == name for model in _registered(client)):
            _create_registered(client, name)
        versions = _versions(client, name)
        found = _same_weights(versions, tags[MANIFEST_TAG])
        if found:
            version = str(found[0].version)
            for tag in (tag for tag in tags if found[0].tags.get(tag) != str(tags[tag])):
                client.set_model_version_tag(name, version, tag, tags[tag])
        else:
            model_id = None
            if tracking_uri.startswith("http") and is_local(source):
                model_id = _upload(client, name, source, run_id, tags, progress)
            place = source if model_id is None else f"models:/{model_id}"
            made = client.create_model_version(
                name, place, run_id=run_id, tags=tags, description=description, model_id=model_id
            )
            version = str(made.version)
            first = str(_same_weights(_versions(client, name), tags[MANIFEST_TAG])[0].version)
            if first != version:  # somebody else registered them at the same moment
                client.delete_model_version(name, version)
                version = first
        if all(int(other.version) <= int(version) for other in versions):
            client.set_registered_model_alias(name, alias, version)
    return version


def _same_weights(versions: list[Any], manifest_sha256: str) -> list[Any]:
    """Versions of these weights, oldest first."""
    same = [version for version in versions if version.tags.get(MANIFEST_TAG) == manifest_sha256]
    return sorted(same, key=lambda version: int(version.version))


def promote(
    tracking_uri: str, name: str, *, version: str | None = None, alias: str = CHAMPION, storage_root: str | None = None
) -> Promotion:
    """Point `alias` at `version`, by default the one under the alias `candidate`, after its weights were verified.

    storage_root: where the storage is now, if that was moved since the weights were registered.
    Raises InputError for an alias that MLflow does not take, an unknown model, version or candidate and names what exists,
    StorageError naming the file of the weights that is missing or altered.
    """
    _check_alias(alias)
    with _registry(tracking_uri) as client:
        model = _model(client, name)
        if version is None:
            version = _under(model, CANDIDATE)
        return _move(client, model, str(version), alias, storage_root)


def rollback(tracking_uri: str, name: str, *, alias: str = CHAMPION, storage_root: str | None = None) -> Promotion:
    """Point `alias` at the version it pointed at before, after its weights were verified. May be repeated.

    Raises InputError where there is no previous version, and what promote() raises.
    """
    with _registry(tracking_uri) as client:
        model = _model(client, name)
        current = _under(model, alias)
        earlier = _line(_history(model, alias), current)
        if not earlier:
            raise InputError(
                f"model {name!r}: {alias!r} points at version {current} and never pointed at another",
                f"promote the version that you want with: minitron promote {name} --version N",
            )
        return _move(client, model, earlier[-1], alias, storage_root, rolled_back=True)


def has_version(tracking_uri: str, name: str, version: str) -> bool:
    """Whether the registry has that version; taken for granted, with a warning, where the registry does not answer."""
    from mlflow.exceptions import MlflowException

    database = sqlite_path(tracking_uri)
    if database is not None and not database.exists():
        return False  # opening it would create it
    try:
        with _registry(tracking_uri) as client:
            try:
                client.get_model_version(name, version)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return False
    except MinitronError as error:
        log.warning("%s version %s was not looked up: %s", name, version, error.problem)
    return True


def models(tracking_uri: str, storage_root: str | None = None) -> list[ModelRow]:
    """All registered versions, by name and newest first; `storage_root` as in `promote`.

    Raises MinitronError where the registry is away."""
    database = sqlite_path(tracking_uri)
    if database is not None and not database.exists():
        return []  # opening it would create it
    rows = []
    with _registry(tracking_uri) as client:
        for model in _registered(client):
            for version in sorted(_versions(client, model.name), key=lambda version: -int(version.version)):
                number = version.tags.get
                rows.append(
                    ModelRow(
                        name=model.name,
                        version=str(version.version),
                        aliases=tuple(sorted(a for a, v in model.aliases.items() if str(v) == str(version.version))),
                        created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
                        parameters=int(number("minitron.parameters")) if number("minitron.parameters") else None,
                        heldout_loss=_float(number("minitron.heldout_loss")),
                        heldout_kl=_float(number("minitron.heldout_kl")),
                        tasks={
                            tag.removeprefix(TASK_TAG): text
                            for tag, text in sorted(version.tags.items())
                            if tag.startswith(TASK_TAG)
                        },
                        source=_weights(version, storage_root),
                        run_id=version.run_id or None,
                    )
                )
    return rows


def _move(
    client: MlflowClient, model: Any, version: str, alias: str, storage_root: str | None, rolled_back: bool = False
) -> Promotion:
    existing = {str(each.version): each for each in _versions(client, model.name)}
    if version not in existing:
        known = ", ".join(sorted(existing, key=int)) or "none"
        raise InputError(f"model {model.name!r} has no version {version!r}", f"choose one of its versions: {known}")
    _verify_weights(client, existing[version], storage_root)
    current = model.aliases.get(alias)
    previous = None if current is None else str(current)
    if previous != version:
        entry = {"version": version, "time": datetime.now(UTC).isoformat(timespec="seconds"), "previous": previous}
        history = [*_history(model, alias), {**entry, "rollback": True} if rolled_back else entry][-HISTORY_KEPT:]
        # In this order a process killed in between leaves an alias that still rolls back to the right version.
        if rolled_back:
            client.set_registered_model_tag(model.name, HISTORY_TAG + alias, json.dumps(history))
        client.set_registered_model_alias(model.name, alias, version)
        if not rolled_back:
            client.set_registered_model_tag(model.name, HISTORY_TAG + alias, json.dumps(history))
    return Promotion(model.name, version, alias, previous)


def _history(model: Any, alias: str) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = json.loads(model.tags.get(HISTORY_TAG + alias, "[]"))
    return history


def _line(history: list[dict[str, Any]], current: str) -> list[str]:
    """The versions that an alias pointed at before `current`, oldest first; what was rolled back is not among them."""
    line: list[str] = []
    for entry in history:
        if entry["previous"] is not None and line[-1:] != [entry["previous"]]:
            line.append(entry["previous"])  # somebody moved the alias by hand before
        if entry.get("rollback"):
            while line and line[-1] != entry["version"]:
                line.pop()
        if line[-1:] != [entry["version"]]:
            line.append(entry["version"])
    while line and line[-1] == current:
        line.pop()
    return line


def _weights(version: Any, storage_root: str | None) -> str:
    """Where a version's weights are: in the storage as it lies now, else where they were registered."""
    below = version.tags.get(PATH_TAG)
    if storage_root is None or below is None:
        return str(version.source)
    here = join(storage_root, check_name(below, f"model version {version.name} {version.version}"))
    return here if here != version.source and is_committed(here) else str(version.source)


def _verify_weights(client: MlflowClient, version: Any, storage_root: str | None) -> None:
    """Raise StorageError naming the file of a version's weights that is missing or altered."""
    where = f"version {version.version} of model {version.name!r}"
    if version.source.startswith("models:/"):
        sizes, text = _uploaded(client, version.source.removeprefix("models:/"))
        for file, expected in json.loads(text)["files"].items():
            if sizes.get(file) != expected["bytes"]:
                problem = (
                    f"{where}: {file} has {sizes.get(file, 'no')} bytes in MLflow, {expected['bytes']} were uploaded"
                )
                raise StorageError(
                    problem, "delete the version and its logged model in MLflow, and register the weights again"
                )
    else:
        weights = _weights(version, storage_root)
        if not is_committed(weights):
            raise StorageError(f"{where}: {weights} has no {MANIFEST}", "promote a version whose weights are there")
        verify(weights)
        text = read_bytes(join(weights, MANIFEST))
    expected = version.tags.get(MANIFEST_TAG)
    if expected is not None and _sha256(text) != expected:
        raise StorageError(
            f"{where}: the weights are not those that were registered",
            "they were replaced; register what is there now, which makes a version of its own",
        )


def _upload(
    client: MlflowClient,
    name: str,
    source: str,
    run_id: str | None,
    tags: dict[str, str],
    progress: Callable[[int, int], None] | None,
) -> str:
    """Upload a committed folder as a logged model, its manifest last; goes on where an earlier call was cut off."""
    experiment = client.get_run(run_id).info.experiment_id if run_id else "0"
    found = client.search_logged_models([experiment], f"tags.`{MANIFEST_TAG}` = '{tags[MANIFEST_TAG]}'")
    model = found[0] if found else client.create_logged_model(experiment, name, source_run_id=run_id, tags=tags)
    if str(model.status) != "READY":
        files = {file: int(entry["bytes"]) for file, entry in manifest(source)["files"].items()}
        total, done = sum(files.values()), 0
        there = _sizes(client, model.model_id)
        with environment_variables(UPLOADING):
            for file, size in [*files.items(), (MANIFEST, -1)]:
                if there.get(file) != size:
                    client.log_model_artifact(
                        model.model_id, str(local_path(source) / file), os.path.dirname(file) or None
                    )
                done += max(size, 0)
                if progress is not None:
                    progress(done, total)
        client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def _sizes(client: MlflowClient, model_id: str, folder: str | None = None) -> dict[str, int]:
    """Bytes of each uploaded file, by its path."""
    sizes: dict[str, int] = {}
    for entry in client.list_logged_model_artifacts(model_id, folder):
        if entry.is_dir:
            sizes.update(_sizes(client, model_id, entry.path))
        else:
            sizes[entry.path] = entry.file_size
    return sizes


def _uploaded(client: MlflowClient, model_id: str) -> tuple[dict[str, int], bytes]:
    """The sizes of an uploaded model's files, and its manifest."""
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as folder:
        address = f"{client.get_logged_model(model_id).artifact_location}/{MANIFEST}"
        path = download_artifacts(address, dst_path=folder, tracking_uri=client.tracking_uri)
        return _sizes(client, model_id), Path(path).read_bytes()


@contextmanager
def _registry(tracking_uri: str) -> Iterator[MlflowClient]:
    """A client; what MLflow refuses becomes an InputError, a registry that is away a MinitronError."""
    prepare_mlflow(tracking_uri)
    remedy = "check that the server runs and that the address is right"
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
            raise InputError(f"MLflow at {redact(tracking_uri)}: {error}", "change the value it names") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise MinitronError(f"MLflow at {redact(tracking_uri)}: {redact(reason)}", remedy) from error


def _check_name(name: str) -> None:
    if not name or any(character in name for character in "/:'\"`"):
        raise InputError(f"model name {name!r} is not allowed", "use a name without slashes, colons and quotes")


def _check_alias(alias: str) -> None:
    try:
        check_alias(alias)
    except ValueError as error:
        raise InputError(f"alias {alias!r} is not allowed: {error}", "choose another, such as champion") from error


def _create_registered(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # somebody else was faster
            raise


def _model(client: MlflowClient, name: str) -> Any:
    _check_name(name)
    known = {model.name: model for model in _registered(client)}
    if name not in known:
        raise InputError(
            f"no model {name!r} is registered", f"choose one of: {', '.join(sorted(known)) or '(none yet)'}"
        )
    return known[name]


def _under(model: Any, alias: str) -> str:
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
    return _all_pages(lambda token: client.search_model_versions(f"name = '{name}'", page_token=token))


def _all_pages(page: Callable[[str | None], Any]) -> list[Any]:
    found = page(None)
    rows = list(found)
    while found.token:
        found = page(found.token)
        rows.extend(found)
    return rows


def _float(text: str | None) -> float | None:
    return None if text is None else float(text)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
