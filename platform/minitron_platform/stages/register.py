"""Register: the student becomes a version in the MLflow registry, with its lineage."""

from __future__ import annotations

import json
from typing import Any

import minitron
from minitron.errors import StorageError
from minitron_platform.estimates.outlook import Estimate, Outlook
from minitron_platform.recipes import schema
from minitron_platform.stages.context import Context
from minitron_platform.stages.correct import Correct
from minitron_platform.stages.data import Data
from minitron_platform.stages.distill import Distill
from minitron_platform.stages.evaluate import Evaluate
from minitron_platform.stages.stage import ArtifactPath, Stage, StageOutput
from minitron_platform.stages.stage_records import INSIDE, relative
from minitron_platform.stages.state import RunState
from minitron_platform.stages.teacher import Teacher
from minitron_platform.tracking import registry
from minitron_platform.tracking.flusher import shown, sqlite_path
from minitron_platform.tracking.registry import TASK_TAG


class RegisterOutput(StageOutput):
    model: str
    """The registered model."""
    version: str
    alias: str
    source: ArtifactPath
    """The student's checkpoint."""


class Register(Stage[RegisterOutput]):
    name = "register"
    version = 2
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
            # with a benchmark that failed it is registered once more, as the same version, when that has its score
            **({"failed": sorted(failed)} if failed else {}),
        }

    def estimate(self, outlook: Outlook, member: schema.Member | None) -> Estimate:
        assert member is not None
        return Estimate(f"{member.model} as {outlook.recipe.register_as.alias}", start_up_seconds=2)

    def run(self, context: Context, folder: str) -> RegisterOutput:
        settings = context.recipe.register_as
        name, origin = context.member.model, context.recipe.origin(context.member)
        teacher, distilled = context.output(Teacher), context.output(Distill)
        figures = context.output(Evaluate).table["distilled"]
        tags = {
            "minitron.version": minitron.__version__,
            "minitron.recipe": context.recipe.name,
            "minitron.run": context.run_key,
            registry.PATH_TAG: relative(context.locations.storage, distilled.student).removeprefix(INSIDE),
            "minitron.teacher": context.recipe.teacher.model,
            "minitron.teacher_sha256": json.dumps(teacher.sha256, sort_keys=True),
            "minitron.teacher_corrected": str(context.output(Correct).corrected),
            "minitron.cut_from": _version(context, origin) if origin else "teacher",
            "minitron.losses": json.dumps(distilled.losses, sort_keys=True),
            "minitron.architecture": json.dumps(distilled.architecture.to_dict(), sort_keys=True),
            "minitron.parameters": str(distilled.parameters),
            "minitron.data": f"{context.recipe.data.kind} {context.recipe.data.path}".strip(),
            "minitron.data_sha256": context.output(Data).train,
            "minitron.tokens": str(distilled.tokens),
            "minitron.heldout_loss": f"{figures.loss:.6f}",
            "minitron.heldout_kl": f"{figures.kl:.6f}",
            **{
                f"{TASK_TAG}{task}": score.shown_as.sentence(score.value, score.stderr)
                for task, score in figures.tasks.items()
            },
            **{f"{TASK_TAG}{task}": f"failed: {reason}" for task, reason in figures.failures.items()},
        }
        run_id = context.mlflow_run_id(context.run_key)
        if run_id is None:
            raise StorageError(
                f"MLflow at {shown(context.locations.tracking_uri)} has not taken the run's record within 30 s",
                "check that the server answers, end drivers of this run that hang on this machine, and run again: all else is "
                "done",
            )
        number = registry.register(
            context.locations.tracking_uri,
            name=name,
            source=distilled.student,
            run_id=run_id,
            tags=tags,
            description=f"{context.recipe.teacher.model} pruned to {distilled.parameters:,} parameters and distilled",
            alias=settings.alias,
        )
        return RegisterOutput(
            model=name,
            version=number,
            alias=settings.alias,
            source=distilled.student,
            summary=f"{name} version {number} as {settings.alias!r}",
        )

    def is_valid(self, state: RunState, output: RegisterOutput) -> bool:
        """Whether the registry, which may have been deleted since, still has the version."""
        return registry.has_version(state.locations.tracking_uri, output.model, output.version)


def _tracking(state: RunState) -> str:
    """The registry, told from others wherever the storage lies that it may be part of."""
    database = sqlite_path(state.locations.tracking_uri)
    return state.locations.tracking_uri if database is None else relative(state.locations.local, str(database))


def _version(context: Context, member: schema.Member) -> str:
    registered = context.output(Register, member)
    return f"{registered.model} version {registered.version}"
