"""The moves of aliases: promote a version, roll back. Whoever moves an alias holds its lock."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minitron.errors import InputError
from minitron_platform.tracking.alias_history import earlier_versions, moves_of, new_move, set_history
from minitron_platform.tracking.alias_lock import alias_lock
from minitron_platform.tracking.client import (
    aliased_version,
    checked_alias,
    open_registry,
    registered_model,
    registered_version,
    versions_of,
)
from minitron_platform.tracking.version_weights import check_weights

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

CANDIDATE = "candidate"
CHAMPION = "champion"


@dataclass(frozen=True)
class Promotion:
    """An alias and the version that it points at now."""

    name: str
    version: str
    alias: str
    previous: str | None
    """The version that it pointed at before; None if it is new."""


def promote(
    tracking_uri: str,
    name: str,
    *,
    version: str | None = None,
    alias: str = CHAMPION,
    storage_root: str | None = None,
    unverified: bool = False,
    verified: bool = False,
    since: tuple[str | None] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Promotion:
    """Point `alias` at a version after comparing the content of its weights with what was registered.

    version: by default the version with the alias `candidate`. storage_root: current location of the storage, in case it was
    moved after the weights were registered. unverified: allow a version whose tag with the SHA-256 of the registered weights is
    missing; anybody who can write to the registry can delete it. verified: the caller has compared the content already.
    since: the version that the alias pointed at when the decision was made, as a tuple with it or None; by default the one at
    the time of the call. tags: added to the version before the alias is moved.
    Raises InputError for an alias that MLflow does not allow, for an unknown model or version, and if the alias was moved to
    another version meanwhile, StorageError for a missing or altered file of the weights, MinitronError if the registry does not
    answer.
    """
    checked_alias(alias)
    with open_registry(tracking_uri) as client:
        model = registered_model(client, name)
        if version is None:
            version = aliased_version(model, CANDIDATE)
        chosen = registered_version(client, name, str(version))
        if not verified:
            check_weights(client, chosen, storage_root, unverified=unverified)
        (before,) = since or (_points_at(model, alias),)
        return _move(client, name, str(chosen.version), alias, before, tags or {})


def rollback(tracking_uri: str, name: str, *, alias: str = CHAMPION, storage_root: str | None = None) -> Promotion:
    """Point `alias` back at its previous version after verifying the weights. Can be repeated.

    If the alias's version was deleted, the one before it is the previous version. Raises InputError if there is none, and what
    promote() raises.
    """
    with open_registry(tracking_uri) as client:
        model = registered_model(client, name)
        moves = moves_of(model, alias)
        # MLflow removes an alias together with its version
        current = "" if alias not in model.aliases and moves else aliased_version(model, alias)
        existing = {str(version.version): version for version in versions_of(client, name)}
        for deleted in [version for version in earlier_versions(moves, current) if version not in existing]:
            log.warning("%s version %s was deleted, and is left out", name, deleted)
        previous = previous_version(moves, current, existing)
        if previous is None:
            raise InputError(
                f"model {name!r}: {alias!r} points at {_text(current or None)} and has no previous version",
                f"choose a version with: minitron promote {name} --version N"
                + (f" --alias {alias}" if alias != CHAMPION else ""),
            )
        check_weights(client, existing[previous], storage_root)
        return _move(client, name, previous, alias, current or None, {}, rolled_back=True)


def previous_version(moves: list[dict[str, Any]], current: str, existing: Container[str]) -> str | None:
    """The version that a rollback points an alias at: the last one before `current` that was not deleted; None without one.

    moves: of the alias. existing: the numbers of the model's versions.
    """
    earlier = reversed(earlier_versions(moves, current))
    return next((version for version in earlier if version in existing and version != current), None)


def _move(
    client: MlflowClient,
    name: str,
    version: str,
    alias: str,
    before: str | None,
    tags: Mapping[str, str],
    *,
    rolled_back: bool = False,
) -> Promotion:
    """Point the alias at a version whose weights are verified, and record that in the history of the alias.

    before: the version that it pointed at when the decision was made.
    """
    with alias_lock(client, name, alias) as lock:
        model = registered_model(client, name)
        previous = _points_at(model, alias)
        if previous != before and previous != version:
            raise InputError(
                f"{name}@{alias} was moved to {_text(previous)} meanwhile, it was at {_text(before)} when you began",
                "look at it with `minitron models`, and try again if you still want to move it",
            )
        for tag, value in tags.items():
            lock.check()
            client.set_model_version_tag(name, version, tag, value)
        if previous != version:
            history = [*moves_of(model, alias), new_move(version, previous, rolled_back=rolled_back)]
            lock.check()
            # In this order the alias can still be rolled back to the right version if the process is killed in between.
            if rolled_back:
                set_history(client, name, alias, history)
            client.set_registered_model_alias(name, alias, version)
            if not rolled_back:
                set_history(client, name, alias, history)
    return Promotion(name, version, alias, previous)


def point_newest(client: MlflowClient, name: str, alias: str, version: str) -> None:
    """Point the alias of newly registered versions at one, unless it points at a newer version."""
    with alias_lock(client, name, alias) as lock:
        current = _points_at(registered_model(client, name), alias)
        if current is None or int(current) < int(version):
            lock.check()
            client.set_registered_model_alias(name, alias, version)


def _points_at(model: Any, alias: str) -> str | None:
    current = model.aliases.get(alias)
    return None if current is None else str(current)


def _text(version: str | None) -> str:
    return "no version" if version is None else f"version {version}"
