"""What a stage is: a name, a version, the type of its output, and what it does. `minitron_platform.stages.order` lists all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from minitron.architecture import Architecture

if TYPE_CHECKING:
    from minitron_platform.estimates.outlook import Estimate, Outlook
    from minitron_platform.recipes.schema import Member
    from minitron_platform.stages.context import Context
    from minitron_platform.stages.state import RunState


class _Artifact:
    """Marks a path without which a stage's output is of no use."""


ArtifactPath = Annotated[str, _Artifact()]
"""A file or folder that a stage wrote; once it is gone, the stage is done again."""


class StageOutput(BaseModel):
    """What a finished stage hands to the later ones; saved in its folder as stage.json and checked when read.

    A field without a default that an older record lacks makes the stage run again; fields that no longer exist are ignored.
    """

    model_config = ConfigDict(frozen=True)

    summary: str
    """One line for the terminal, MLflow and the report."""
    fingerprint: str = ""
    """Content address of the output; set when the stage is recorded."""

    def artifacts(self) -> Iterator[str]:
        """The paths that must exist for the output to be of use."""
        for name, field in type(self).model_fields.items():
            if any(isinstance(mark, _Artifact) for mark in field.metadata) and (path := getattr(self, name)):
                yield path


class StudentOutput(StageOutput):
    """The output of a stage that makes a model of the family, from which the next one may be cut."""

    student: ArtifactPath
    """The checkpoint."""
    id: str
    architecture: Architecture


T = TypeVar("T", bound=StageOutput)


class Stage(ABC, Generic[T]):
    """One step of a run. Stateless: everything is read from the run's state, everything made goes into the stage's folder."""

    name: ClassVar[str]
    version: ClassVar[int]
    """Raised when the same inputs would give another output."""
    per_model: ClassVar[bool]
    """Whether every model of the family has its own; otherwise it is done once, before the first model that needs it."""
    output_type: ClassVar[type[StageOutput]]
    """Of `run`."""

    @abstractmethod
    def inputs(self, state: RunState) -> dict[str, Any]:
        """A JSON value of everything that can change the output; with the name and the version it is the fingerprint."""

    @abstractmethod
    def run(self, context: Context, folder: str) -> T:
        """Do the work. `folder` is the stage's own; what an interrupted attempt left there is used."""

    @abstractmethod
    def estimate(self, outlook: Outlook, member: Member | None) -> Estimate:
        """What the stage will take, from shapes and settings alone; `member` is the model it is for if there is one each."""

    def record(self, context: Context, output: T) -> None:
        """Add to the run's record what the runner does not write by itself: curves, tags, further records."""

    def metrics(self, output: T) -> dict[str, float]:
        """Numbers for the stage's record in MLflow."""
        return {}

    def is_valid(self, state: RunState, output: T) -> bool:
        """Whether a finished stage's effects elsewhere, such as in the registry, are still there."""
        return True
