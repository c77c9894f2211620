"""The base class of stages and of their outputs. `minitron_platform.stages.order` lists all stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar, get_args

from pydantic import BaseModel, ConfigDict

from minitron.architecture import Architecture
from minitron_platform.tracking.restarts import Restart

if TYPE_CHECKING:
    from minitron_platform.estimates.outlook import Estimate, Outlook
    from minitron_platform.recipes.schema import Member, Recipe
    from minitron_platform.stages.context import Context
    from minitron_platform.stages.state import RunState


class _Artifact:
    """Marks a field as the path of a file or folder that the stage wrote."""


ArtifactPath = Annotated[str, _Artifact()]
"""A file or folder that a stage wrote; if it is missing, the stage runs again."""


class StageOutput(BaseModel):
    """What a finished stage passes to later stages; saved in the stage's folder as stage.json and validated when it is read.

    If an earlier version's stage.json lacks a field that has no default, the stage runs again; fields that no longer exist
    are ignored.
    """

    model_config = ConfigDict(frozen=True)

    summary: str
    """One line for the terminal, MLflow and the report."""
    fingerprint: str = ""
    """Content address of the output; set when the record is written."""
    restarts: tuple[Restart, ...] = ()
    """Failures of the stage's workers and trials, by earlier drivers too; those of workers are added when the record is
    written."""

    @property
    def is_final(self) -> bool:
        """Whether nothing is left to be done later."""
        return True

    def artifacts(self) -> Iterator[str]:
        """The files and folders that the output refers to."""
        for name, field in type(self).model_fields.items():
            if _is_path(field.metadata) and (path := getattr(self, name)):
                yield path

    def paths(self) -> Iterator[str]:
        """All paths of the output: the artifacts, and files whose field may be None, without which it is of use, too."""
        yield from self.artifacts()
        for name, field in type(self).model_fields.items():
            optional = any(_is_path(getattr(option, "__metadata__", ())) for option in get_args(field.annotation))
            if optional and (path := getattr(self, name)):
                yield path


def _is_path(metadata: Iterable[Any]) -> bool:
    return any(isinstance(value, _Artifact) for value in metadata)


class StudentOutput(StageOutput):
    """Output of a stage that makes a model of the family, which the next one may be pruned from."""

    student: ArtifactPath
    """Checkpoint folder of the model."""
    id: str
    """Content address of its weights."""
    architecture: Architecture


T = TypeVar("T", bound=StageOutput)


class Stage(ABC, Generic[T]):
    """One stage of a run. It has no state of its own: it reads the run's state and writes into its folder."""

    name: ClassVar[str]
    version: ClassVar[int]
    """Raised when the same inputs give another output than before."""
    per_model: ClassVar[bool]
    """Whether the stage runs once for every model of the family; otherwise it runs once per run, and the family shares it."""
    output_type: ClassVar[type[StageOutput]]
    """Type of the output of `run`."""

    @abstractmethod
    def inputs(self, state: RunState) -> dict[str, Any]:
        """Everything that can change the output, as a JSON value. With the stage's name and version it makes the
        fingerprint."""

    def recipe_key(self, recipe: Recipe, member: Member | None) -> str:
        """Recipe key of the stage's settings, which input errors of the stage are named by: by default the stage's name."""
        return self.name

    @abstractmethod
    def run(self, context: Context, folder: str) -> T:
        """Do the work and return the output. `folder` is the stage's own; an interrupted attempt may have left files
        there."""

    @abstractmethod
    def estimate(self, outlook: Outlook, member: Member | None) -> Estimate:
        """Estimated cost, from shapes and settings alone, for the model `member`; None for a stage that the family shares."""

    def record(self, context: Context, output: T) -> None:
        """Add curves and tags to the stage's record, and write further records. The runner adds everything else."""

    def metrics(self, output: T) -> dict[str, float]:
        """Metrics for the stage's record in MLflow."""
        return {}

    def is_valid(self, state: RunState, output: T) -> bool:
        """Whether the output of a finished stage can still be used; if not, the stage runs again."""
        return True
