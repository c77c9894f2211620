"""The moves of a registered model's alias, which MLflow does not keep: in a tag of the model."""

from __future__ import annotations

import json
import logging
from typing import Any

log = logging.getLogger(__name__)

HISTORY_TAG = "minitron.history."


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
    """Whether an entry of a history has the keys that `_move` writes."""
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
