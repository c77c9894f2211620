"""Register: add the student to the MLflow registry as a new version, with tags that say how it was made."""

from __future__ import annotations

import json
from typing import Any

import minitron
from minitron import storage
from minitron.errors import StorageError
from minitron.storage import redact
from minitron_platform.estimates.outlook import Estimate, Outlook
from minitron_platform.gates.judge import GATES_TAG
from minitron_platform.recipes import schema
from minitron_platform.recipes.build import text_sources
from minitron_platform.stages.context import Context
from minitron_platform.stages.correct import Correct
from minitron_platform.stages.data import Data
from minitron_platform.stages.distill import Distill
from minitron_platform.stages.evaluate import Evaluate, EvaluateOutput, results_of_documents, score_metrics
from minitron_platform.stages.model_card import description, model_card
from minitron_platform.stages.stage import ArtifactPath, Stage, StageOutput
from minitron_platform.stages.stage_records import path_inside, relative
from minitron_platform.stages.state import RunState
from minitron_platform.stages.targets import Targets
from minitron_platform.stages.teacher import Teacher
from minitron_platform.tracking import registry
from minitron_platform.tracking.flusher import sqlite_path
from minitron_platform.tracking.logged_models import ModelFigures
from minitron_platform.tracking.variant_tags import PARENT_TAG
from minitron_platform.tracking.version_figures import Measured, VersionFigures
from minitron_platform.tracking.version_weights import CARD, PATH_TAG


class RegisterOutput(StageOutput):
    model: str
    """Name of the registered model."""
    version: str
    alias: str
    source: ArtifactPath
    """The student's checkpoint."""


class Register(Stage[RegisterOutput]):
    name = "register"
    version = 4
    per_model = True
    output_type = RegisterOutput

    def inputs(self, state: RunState) -> dict[str, Any]:
        failed = state.output(Evaluate).table["distilled"].failures
        return {
            "student": state.output(Distill).id,
            "evaluate": state.output(Evaluate).fingerprint,
            "model": state.member.model,
            "register": state.recipe.register_as.model_dump(),
            "tracking": _tracking(state),
            # once a failed benchmark has a score, the stage runs again and updates the same version
            **({"failed": sorted(failed)} if failed else {}),
        }

    def estimate(self, outlook: Outlook, member: schema.Member | None) -> Estimate:
        assert member is not None
        return Estimate(f"{member.model} as {outlook.recipe.register_as.alias}", start_up_seconds=2)

    def run(self, context: Context, folder: str) -> RegisterOutput:
        settings = context.recipe.register_as
        name = context.member.model
        previous = context.recipe.origin(context.member)
        teacher = context.output(Teacher)
        distilled = context.output(Distill)
        evaluated = context.output(Evaluate)
        figures = VersionFigures(
            heldout=context.output(Targets).fingerprint,
            student=_measured(context, evaluated, "distilled"),
            teacher=_measured(context, evaluated, "teacher"),
            pruned=_measured(context, evaluated, "pruned"),
        )
        tags = {
            GATES_TAG: settings.gates.model_dump_json(),
            "minitron.version": minitron.__version__,
            "minitron.recipe": context.recipe.name,
            "minitron.run": context.run_key,
            PATH_TAG: path_inside(context.locations.storage, distilled.student),
            "minitron.teacher": context.recipe.teacher.model,
            "minitron.teacher_sha256": json.dumps(teacher.sha256, sort_keys=True),
            "minitron.teacher_corrected": str(context.output(Correct).corrected),
            PARENT_TAG: _version(context, previous) if previous else "teacher",
            "minitron.losses": json.dumps(distilled.losses, sort_keys=True),
            "minitron.architecture": json.dumps(distilled.architecture.to_dict(), sort_keys=True),
            "minitron.parameters": str(distilled.parameters),
            "minitron.data": ", ".join(source.label for source in text_sources(context.recipe.data).values()),
            "minitron.data_sha256": context.output(Data).train,
            "minitron.tokens": str(distilled.tokens),
            **registry.figure_tags(figures),
        }
        card = model_card(context)
        storage.write_bytes(storage.join(distilled.student, CARD), str(card).encode())
        run_id = context.mlflow_run_id(context.run_key)
        if run_id is None:
            raise StorageError(
                f"MLflow at {redact(context.locations.tracking_uri)} has not accepted the run's record within 30 s",
                "check that the server answers, and run again: only this stage is left",
            )
        own_run = context.mlflow_run_id(context.log(self.name).key) or run_id
        version = registry.register(
            context.locations.tracking_uri,
            name=name,
            source=distilled.student,
            run_id=run_id,
            tags=tags,
            description=description(card),
            alias=settings.alias,
            figures=ModelFigures(own_run, _metrics(evaluated), _params(context)),
        )
        return RegisterOutput(
            model=name,
            version=version,
            alias=settings.alias,
            source=distilled.student,
            summary=f"{name} version {version} as {settings.alias!r}",
        )

    def is_valid(self, state: RunState, output: RegisterOutput) -> bool:
        """Whether the registry still has the version; the registry may have been deleted."""
        return registry.has_version(state.locations.tracking_uri, output.model, output.version)


def _metrics(evaluated: EvaluateOutput) -> dict[str, float]:
    """The figures of the student, and under "teacher." the same of the teacher, that MLflow shows on the model's page."""
    metrics: dict[str, float] = {}
    for prefix, model in (("", "distilled"), ("teacher.", "teacher")):
        figures = evaluated.table[model]
        values: dict[str, float | None] = {**figures.numbers}
        values |= score_metrics(figures.tasks)
        metrics |= {f"{prefix}{name}": value for name, value in values.items() if value is not None}
    return metrics


def _params(context: Context) -> dict[str, str]:
    """Where the student comes from, for the model's page."""
    distilled = context.output(Distill)
    previous = context.recipe.origin(context.member)
    return {
        "teacher": context.recipe.teacher.model,
        "cut_from": _version(context, previous) if previous else "teacher",
        "architecture": str(distilled.architecture),
        "tokens": str(distilled.tokens),
        "run": context.run_key,
    }


def _measured(context: Context, evaluated: EvaluateOutput, model: str) -> Measured:
    """The figures of a model for its version, and where the results of its documents are."""
    figures = evaluated.table[model]
    documents = results_of_documents(context, model)
    return Measured(
        loss=figures.loss,
        kl=figures.kl,
        tasks=figures.tasks,
        failures=figures.failures,
        tokens_per_second=figures.tokens_per_second,
        documents=path_inside(context.locations.storage, documents),
    )


def _tracking(state: RunState) -> str:
    """Identity of the registry; the path of a database inside the storage is relative, so that the storage can be moved."""
    database = sqlite_path(state.locations.tracking_uri)
    return state.locations.tracking_uri if database is None else relative(state.locations.local, str(database))


def _version(context: Context, member: schema.Member) -> str:
    """The registered version of an earlier model of the family, as text."""
    registered = context.output(Register, member)
    return f"{registered.model} version {registered.version}"
