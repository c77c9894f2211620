"""Where a registered version comes from, and what was made of it, from the tags that its registration wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CUT_FROM = re.compile(r"(.+) version (\d+)")  # the tag minitron.cut_from; or "teacher"


@dataclass(frozen=True)
class Lineage:
    """The models that a version comes from, the oldest first, and those that come from it."""

    origins: tuple[str, ...]
    descendants: tuple[str, ...]


def title(version: Any) -> str:
    return f"{version.name} version {version.version}"


def lineage(version: Any, versions: Sequence[Any]) -> Lineage:
    """The lineage of a version among all `versions` of the registry. Ones that were deleted are named and end it."""
    by_title = {title(each): each for each in versions}
    origins: list[str] = []
    current: Any | None = version
    seen = {title(version)}
    while current is not None:
        parent = current.tags.get("minitron.cut_from", "")
        if CUT_FROM.fullmatch(parent) is None or parent in seen:
            origins += _teacher(current)
            break
        seen.add(parent)
        origins.append(parent if parent in by_title else f"{parent} (deleted)")
        current = by_title.get(parent)
    return Lineage(tuple(reversed(origins)), tuple(_descendants(version, versions)))


def _teacher(version: Any) -> list[str]:
    """The teacher that a version is cut from, its correction first; nothing if it is not recorded."""
    teacher = version.tags.get("minitron.teacher")
    if teacher is None:
        return []
    corrected = version.tags.get("minitron.teacher_corrected") == "True"
    return [*([f"{teacher}, corrected on the text"] if corrected else []), f"{teacher} (teacher)"]


def _descendants(version: Any, versions: Sequence[Any]) -> list[str]:
    found: list[str] = []
    todo = [title(version)]
    while todo:
        parent = todo.pop(0)
        children = [title(each) for each in versions if each.tags.get("minitron.cut_from") == parent]
        new = [child for child in sorted(children) if child not in found and child != title(version)]
        found += new
        todo += new
    return found
