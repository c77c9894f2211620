"""Where a registered version comes from, and what was made of it, from the tags that its registration wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from minitron_platform.tracking.variant_tags import PARENT_TAG, kind_of

CUT_FROM = re.compile(r"(.+) version (\d+)")  # the tag PARENT_TAG; or "teacher"


@dataclass(frozen=True)
class Descendant:
    """A version that was made of another, directly or by way of versions between them."""

    title: str
    kind: str | None
    """What was done to its parent by another tool; None for a student."""
    generation: int
    """1 for what was made of it directly."""

    @property
    def described(self) -> str:
        """Its title with its kind."""
        return self.title if self.kind is None else f"{self.title}, {self.kind}"


@dataclass(frozen=True)
class Lineage:
    """The models that a version comes from, the oldest first, and those that come from it: each before its own."""

    origins: tuple[str, ...]
    descendants: tuple[Descendant, ...]


def title(version: Any) -> str:
    return f"{version.name} version {version.version}"


def described(version: Any) -> str:
    """Its title and, of a variant, what was done to its parent."""
    kind = kind_of(version)
    return title(version) if kind is None else f"{title(version)}, {kind}"


def lineage(version: Any, versions: Sequence[Any]) -> Lineage:
    """The lineage of a version among all `versions` of the registry. Ones that were deleted are named and end it."""
    by_title = {title(each): each for each in versions}
    origins: list[str] = []
    current: Any | None = version
    seen = {title(version)}
    while current is not None:
        parent = current.tags.get(PARENT_TAG, "")
        if CUT_FROM.fullmatch(parent) is None or parent in seen:
            origins += _teacher(current)
            break
        seen.add(parent)
        origins.append(described(by_title[parent]) if parent in by_title else f"{parent} (deleted)")
        current = by_title.get(parent)
    return Lineage(tuple(reversed(origins)), tuple(_descendants(title(version), versions, 1, {title(version)})))


def _teacher(version: Any) -> list[str]:
    """The teacher that a version is cut from, its correction first; nothing if it is not recorded."""
    teacher = version.tags.get("minitron.teacher")
    if teacher is None:
        return []
    corrected = version.tags.get("minitron.teacher_corrected") == "True"
    return [*([f"{teacher}, corrected on the text"] if corrected else []), f"{teacher} (teacher)"]


def _descendants(parent: str, versions: Sequence[Any], generation: int, seen: set[str]) -> Iterator[Descendant]:
    """What was made of the version `parent`: each child, by name, followed by its own."""
    children = {title(each): each for each in versions if each.tags.get(PARENT_TAG) == parent}
    for child in sorted(children.keys() - seen):
        seen.add(child)
        yield Descendant(child, kind_of(children[child]), generation)
        yield from _descendants(child, versions, generation + 1, seen)
