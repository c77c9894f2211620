"""The result of one check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What a check says."""

    check: str
    """Its name, such as "open files"."""
    where: str
    """The node, or what else was checked."""
    state: State
    """A warning costs time or will be a problem at some size; what has failed stops a run."""
    value: str
    """What was measured or seen."""
    remedy: str = ""
    """What to do, unless everything is well."""


def has_failed(findings: Iterable[Finding]) -> bool:
    """Whether any check has failed."""
    return any(finding.state == "failed" for finding in findings)
