"""The tags of a registered version that another tool has made from a registered one, which is called its parent."""

from __future__ import annotations

from typing import Any, Literal

Kind = Literal["aligned", "quantised"]
KINDS: tuple[Kind, ...] = ("aligned", "quantised")
KIND_TAG = "minitron.kind"
PARENT_TAG = "minitron.cut_from"  # also of students: their parent is what they were pruned from


def kind_of(version: Any) -> str | None:
    """What was done to the parent; None for a student, which is pruned and distilled, and for models of others."""
    kind = version.tags.get(KIND_TAG)
    return kind if kind in KINDS else None


def made_from(version: Any) -> str | None:
    """What was done to which version, as text; None for what `kind_of` is None."""
    kind = kind_of(version)
    return None if kind is None else f"{kind} from {version.tags.get(PARENT_TAG, 'an unknown version')}"
