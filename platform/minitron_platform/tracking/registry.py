"""MLflow's model registry: register models, list them, copy their weights.

The weights of a version stay where they were written, in a folder that `minitron.storage` committed, and the version has its
path; the SHA-256 of the folder's manifest is the tag `minitron.manifest_sha256`. A tracking server does not accept paths on
another machine, so for a server local weights are uploaded as an MLflow logged model. An alias is only moved to a version whose
weights pass verification; its earlier versions are in the registered model's tag `minitron.history.<alias>`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

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
    verify,
)
from minitron_platform.tracking.client import (
    RegistryError,
    aliased_version,
    all_versions,
    check_model_name,
    checked_alias,
    find_registered,
    open_registry,
    registered_model,
    registered_models,
    registered_version,
    versions_of,
)
from minitron_platform.tracking.flusher import sqlite_path
from minitron_platform.tracking.logged_models import ModelFigures, complete, find_or_create
from minitron_platform.tracking.moves import CANDIDATE, CHAMPION, point_newest
from minitron_platform.tracking.variant_tags import made_from
from minitron_platform.tracking.version_figures import FIGURES_TAG, VersionFigures, figures_of, number_in
from minitron_platform.tracking.version_weights import CARD, MANIFEST_TAG, copy_weights, location, uploaded_sizes

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

# followed by a benchmark's name; the value is its score, such as "acc 47.5 ± 4.6 % (0-shot, all 570 documents of test)"
TASK_TAG = "minitron.task."
DELETED = "Deleted_Internal"  # the stage of versions that were deleted, in MLflow's database
# Uploads of several gigabytes take long; prepare_mlflow gives other requests a timeout of seconds.
UPLOADING = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1800", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5"}


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
    tokens_per_second: float | None
    """In prefill, if the recipe had it measured."""
    tasks: dict[str, str]
    """Scores by benchmark, as text such as "acc 47.5 ± 4.6 %"."""
    source: str
    """Folder of the weights, or MLflow's address of an uploaded model."""
    run_id: str | None
    """The MLflow run that registered it."""
    made_from: str | None
    """For example "aligned from small version 3"; None for what no other tool has changed."""


def figure_tags(figures: VersionFigures) -> dict[str, str]:
    """The tags of a version with its figures, for the gates and for people."""
    own = figures.student
    return {
        FIGURES_TAG: figures.model_dump_json(),
        "minitron.heldout_loss": f"{own.loss:.6f}",
        **({} if own.kl is None else {"minitron.heldout_kl": f"{own.kl:.6f}"}),
        **{f"{TASK_TAG}{task}": score.sentence for task, score in own.tasks.items()},
        **{f"{TASK_TAG}{task}": f"failed: {reason}" for task, reason in own.failures.items()},
    }


def register(
    tracking_uri: str,
    *,
    name: str,
    source: str,
    run_id: str | None,
    tags: dict[str, str],
    description: str = "",
    alias: str = CANDIDATE,
    figures: ModelFigures | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Register the weights in the folder `source` as a version of the model `name` and set `alias`; returns the version.

    The same weights are registered only once: another call returns the existing version after updating its tags, and does not
    move the alias if it points at a newer version.
    run_id: of the MLflow run that the version belongs to. figures: for the MLflow logged model of the weights; without them
    there is none, unless the weights are uploaded. progress: called with (bytes uploaded, total bytes) during an upload.
    Raises InputError for a name or alias that MLflow does not allow, StorageError if `source` is not a committed folder or is
    incomplete, and MinitronError if the registry does not answer.
    """
    check_model_name(name)
    checked_alias(alias)
    source = absolute(source)
    if not is_committed(source):
        raise StorageError(f"{source}: has no {MANIFEST}", "give a folder of weights that minitron wrote")
    verify(source, hashes=False)
    tags = {**tags, MANIFEST_TAG: _sha256(read_bytes(join(source, MANIFEST)))}
    with open_registry(tracking_uri, create=True) as client:
        if find_registered(client, name) is None:
            _create_registered(client, name)
        versions = versions_of(client, name)
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
                model_id = _upload(client, name, source, run_id, tags, figures, progress)
            address = source if model_id is None else f"models:/{model_id}"
            created = client.create_model_version(
                name, address, run_id=run_id, tags=tags, description=description, model_id=model_id
            )
            version = str(created.version)
            first = str(_same_weights(versions_of(client, name), tags[MANIFEST_TAG])[0].version)
            if first != version:  # another process registered the same weights at the same moment
                client.delete_model_version(name, version)
                version = first
        if figures is not None:
            model = find_or_create(client, name, run_id, tags, figures.params)
            complete(client, str(model.model_id), figures, name, version)
        point_newest(client, name, alias, version)
    return version


def _same_weights(versions: list[Any], manifest_sha256: str) -> list[Any]:
    """The versions with this manifest, oldest first."""
    same = [version for version in versions if version.tags.get(MANIFEST_TAG) == manifest_sha256]
    return sorted(same, key=lambda version: int(version.version))


def check_not_prompts(tracking_uri: str, names: Mapping[str, str]) -> None:
    """Raise InputError if MLflow has a prompt of one of the model names `names`, by recipe key: it would refuse the model after
    all the work. Does nothing if the registry does not answer, which it only has to when the model is registered."""
    database = sqlite_path(tracking_uri)
    if database is not None and not database.exists():
        return
    try:
        with open_registry(tracking_uri) as client:
            for key, name in names.items():
                if client.get_prompt(name) is not None:
                    raise _prompt_of_that_name(f"{key}: {name!r}")
    except RegistryError as error:
        log.warning("cannot check whether a prompt has the name of a model: %s", error.problem)


def _prompt_of_that_name(named: str) -> InputError:
    return InputError(
        f"{named}: MLflow has a prompt of that name, and no model can have it",
        "choose another one, or rename the prompt",
    )


def has_version(tracking_uri: str, name: str, version: str) -> bool:
    """Whether the registry has a version. If it does not answer, a warning is logged and the result is True."""
    database = sqlite_path(tracking_uri)
    if database is not None and not database.exists():
        return False  # opening it would create the file
    if database is not None and _is_listed(database, name, version):
        return True
    from mlflow.exceptions import MlflowException

    try:
        with open_registry(tracking_uri) as client:
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
    with open_registry(tracking_uri) as client:
        aliases = {model.name: model.aliases for model in registered_models(client)}
        for version in all_versions(client):
            pointing = aliases.get(version.name, {}).items()
            rows.append(
                ModelRow(
                    name=version.name,
                    version=str(version.version),
                    aliases=tuple(sorted(alias for alias, number in pointing if str(number) == str(version.version))),
                    created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
                    parameters=None if (size := number_in(version, "minitron.parameters")) is None else round(size),
                    heldout_loss=number_in(version, "minitron.heldout_loss"),
                    heldout_kl=number_in(version, "minitron.heldout_kl"),
                    tokens_per_second=None
                    if (known := figures_of(version)) is None
                    else known.student.tokens_per_second,
                    tasks={
                        tag.removeprefix(TASK_TAG): text
                        for tag, text in sorted(version.tags.items())
                        if tag.startswith(TASK_TAG)
                    },
                    source=listed_location(version, storage_root),
                    run_id=version.run_id or None,
                    made_from=made_from(version),
                )
            )
    return rows


def listed_location(version: Any, storage_root: str | None) -> str:
    """Location of a version's weights; the registered one, with a warning, if somebody has written a path that is none."""
    try:
        return location(version, storage_root)
    except StorageError as error:
        log.warning("%s", error.problem)
        return str(version.source)


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
    an unknown model, version or alias and for a folder with other files, StorageError for altered or missing weights.
    """
    if (
        is_local(target)
        and local_path(target).exists()
        and any(local_path(target).iterdir())
        and not is_committed(target)
    ):
        raise InputError(f"{target}: there are files in it", "give a new folder")
    with open_registry(tracking_uri) as client:
        model = registered_model(client, name)
        version = version or aliased_version(model, alias)
        copy_weights(client, registered_version(client, name, version), storage_root, target, unverified=unverified)
        return version


def _upload(
    client: MlflowClient,
    name: str,
    source: str,
    run_id: str | None,
    tags: dict[str, str],
    figures: ModelFigures | None,
    progress: Callable[[int, int], None] | None,
) -> str:
    """Upload a committed folder as a logged model, its manifest last; returns the model's id.

    Files that an earlier call uploaded before it was interrupted are not uploaded again.
    """
    model = find_or_create(client, name, run_id, tags, None if figures is None else figures.params)
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


def _create_registered(client: MlflowClient, name: str) -> None:
    """Create a registered model, unless another process does at the same moment. Raises InputError for the name of a prompt."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        if find_registered(client, name) is None:  # prompts share the names of models, and are not found as such
            raise _prompt_of_that_name(f"model name {name!r}") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
