"""The moves of a registered model's alias, which MLflow does not keep: in a tag of the model."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

HISTORY_TAG = "minitron.history."
HISTORY_LENGTH = 5000  # characters of a registered model's tag in PostgreSQL and MySQL; about 50 moves


def new_move(version: str, previous: str | None, *, rolled_back: bool) -> dict[str, Any]:
    """A move of an alias now, from the version `previous` to `version`."""
    move = {"version": version, "time": datetime.now(UTC).isoformat(timespec="seconds"), "previous": previous}
    return {**move, "rollback": True} if rolled_back else move


def set_history(client: MlflowClient, name: str, alias: str, moves: list[dict[str, Any]]) -> None:
    """Store the moves of an alias, the last of them that a tag has room for."""
    text = json.dumps(moves)
    while len(text) > HISTORY_LENGTH:
        moves = moves[1:]
        text = json.dumps(moves)
    client.set_registered_model_tag(name, HISTORY_TAG + alias, text)


def moves_of(model: Any, alias: str) -> list[dict[str, Any]]:
    """The recorded moves of an alias, oldest first."""
    text = model.tags.get(HISTORY_TAG + alias, "[]")
    try:
        history = json.loads(text)
    except (ValueError, RecursionError):
        history = None
    if not isinstance(history, list) or not all(_is_move(entry) for entry in history):
        log.warning("%s: the tag %s%s is not a history of moves, and is not used", model.name, HISTORY_TAG, alias)
        return []
    return history


def _is_move(entry: Any) -> bool:
    """Whether an entry of a history has the keys of `new_move`."""
    if not isinstance(entry, dict) or not isinstance(entry.get("version"), str):
        return False
    return isinstance(entry.get("previous"), str | None)


def earlier_versions(history: list[dict[str, Any]], current: str) -> list[str]:
    """The versions that an alias pointed at before `current`, oldest first, without those that were rolled back."""
    versions: list[str] = []
    for entry in history:
        if entry.get("previous") is not None and versions[-1:] != [entry["previous"]]:
            versions.append(entry["previous"])  # the alias was moved without minitron
        if entry.get("rollback"):
            while versions and versions[-1] != entry["version"]:
                versions.pop()
        if versions[-1:] != [entry["version"]]:
            versions.append(entry["version"])
    while versions and versions[-1] == current:
        versions.pop()
    return versions
