"""What a gate is asked about, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minitron_platform.gates.clean_process import Loaded
from minitron_platform.gates.documents import Documents, read_documents
from minitron_platform.recipes.schema import Gates
from minitron_platform.tracking.version_figures import VersionFigures, figures_of

Status = Literal["passed", "failed", "unknown"]
NOT_MEASURED = "not measured"
NO_FIGURES = "no figures are recorded"


@dataclass(frozen=True)
class Verdict:
    """The answer of a gate about one figure."""

    gate: str
    status: Status
    """`unknown` if there is nothing to judge by, which refuses nothing. What a limit of the recipe asks for, and what the
    model that it is compared with has, must be known."""
    measured: str
    limit: str = ""


@dataclass(frozen=True)
class Subject:
    """A version that is to be promoted."""

    version: Any
    """MLflow's."""
    folder: Path
    """Its weights, verified, on this machine."""
    settings: Gates
    loaded: Loaded
    champion: Any | None
    """The version that the alias points at now; None if there is none, or if it is this one."""
    storage_root: str | None

    @property
    def figures(self) -> VersionFigures | None:
        return figures_of(self.version)

    def documents(self, path: str | None) -> Documents | None:
        """Results of every row and document, from a file of the storage."""
        return read_documents(self.storage_root, path)


Gate = Callable[[Subject], list[Verdict]]


def at_most(gate: str, value: float | None, limit: float, text: Callable[[float], str]) -> Verdict:
    """The verdict on a figure that may be no larger than a limit. One that is not known, or NaN, fails."""
    if value is None:
        return Verdict(gate, "failed", NOT_MEASURED, f"at most {text(limit)}")
    return Verdict(gate, "passed" if value <= limit else "failed", text(value), f"at most {text(limit)}")
