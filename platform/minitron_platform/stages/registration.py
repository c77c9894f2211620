"""A student in the MLflow registry, or on its way there if MLflow did not answer at the end of the run."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, model_validator

from minitron_platform.stages.stage import ArtifactPath, StageOutput
from minitron_platform.tracking import registry
from minitron_platform.tracking.logged_models import ModelFigures
from minitron_platform.tracking.variant_tags import PARENT_TAG

ANSWER_SECONDS = 30.0  # without any answer of MLflow after which a registration waits in the storage


class Registration(BaseModel):
    """What a version gets, except what only the registry knows: the version of its parent and the MLflow runs."""

    model_config = ConfigDict(frozen=True)

    parent: str | None
    """Name of the model of the family that it was cut from; None for the teacher."""
    description: str
    tags: dict[str, str]
    metrics: dict[str, float]
    """Metrics of the MLflow logged model."""
    params: dict[str, str]
    """Parameters of the MLflow logged model."""
    record: str
    """Key of the record of the stage `register`, which the logged model's figures belong to."""
    registry: str | None = None
    """MLflow's address without its password; None for the database in the storage."""


class RegisterOutput(StageOutput):
    model: str
    """Name of the registered model."""
    version: str | None
    """None as long as MLflow has not taken it."""
    alias: str
    source: ArtifactPath
    """The student's checkpoint."""
    waiting: Registration | None = None
    """What is to be sent; None once it is registered."""

    @model_validator(mode="after")
    def _is_registered_or_waits(self) -> RegisterOutput:
        if self.version is None and self.waiting is None:
            raise ValueError("neither a version nor what is to be registered")
        return self

    @property
    def is_final(self) -> bool:
        """Whether the student is registered."""
        return self.version is not None

    @property
    def title(self) -> str:
        """The version as text."""
        return f"{self.model}, not registered yet" if self.version is None else f"{self.model} version {self.version}"


def send(
    output: RegisterOutput,
    registration: Registration,
    tracking_uri: str,
    parent: RegisterOutput | None,
    run_id: str,
    record_id: str | None,
) -> RegisterOutput:
    """Register a student; returns `output` with its version. The same weights are registered once.

    parent: of `registration.parent`, registered; None for the teacher. run_id: of the run in MLflow. record_id: of
    `registration.record`, if MLflow has that. Raises RegistryError if the registry does not answer, and what
    `registry.register` raises.
    """
    cut_from = "teacher" if parent is None else parent.title
    version = registry.register(
        tracking_uri,
        name=output.model,
        source=output.source,
        run_id=run_id,
        tags={**registration.tags, PARENT_TAG: cut_from},
        description=registration.description,
        alias=output.alias,
        figures=ModelFigures(record_id or run_id, registration.metrics, {**registration.params, "cut_from": cut_from}),
    )
    summary = f"{output.model} version {version} as {output.alias!r}"
    return output.model_copy(update={"version": version, "waiting": None, "summary": summary})
