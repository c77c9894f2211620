"""Register: add the student to the MLflow registry as a new version, with tags that say how it was made.

A registry that does not answer costs nothing that is finished: the run goes on, and what is to be registered waits in the
storage for the end of the run, the next run, or `minitron sync`.
"""

from __future__ import annotations

import json
from typing import Any

from rich.markup import escape

import minitron
from minitron import storage
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
from minitron_platform.stages.registration import RegisterOutput, Registration, send
from minitron_platform.stages.stage import Stage
from minitron_platform.stages.stage_records import path_inside, relative
from minitron_platform.stages.state import RunState
from minitron_platform.stages.targets import Targets
from minitron_platform.stages.teacher import Teacher
from minitron_platform.tracking import registry
from minitron_platform.tracking.client import RegistryError
from minitron_platform.tracking.flusher import sqlite_path
from minitron_platform.tracking.version_figures import Measured, VersionFigures
from minitron_platform.tracking.version_weights import CARD, PATH_TAG


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
        previous = context.recipe.origin(context.member)
        parent = context.output(Register, previous) if previous else None
        registration = _registration(context, previous)
        output = RegisterOutput(
            model=context.member.model,
            version=None,
            alias=context.recipe.register_as.alias,
            source=context.output(Distill).student,
            waiting=registration,
            summary="",
        )
        uri = context.locations.tracking_uri
        try:
            if parent is not None and not parent.is_final:
                raise RegistryError(f"{parent.title}, which {output.model} was cut from")
            run_id = context.mlflow_run_id(context.run_key)
            if run_id is None:
                raise RegistryError(f"MLflow at {redact(uri)} has not accepted the run's record")
            return send(output, registration, uri, parent, run_id, context.mlflow_run_id(registration.record))
        except RegistryError as error:
            context.console.say(f"  [yellow]{escape(error.problem)}: the registration waits in the storage[/]")
            return output.model_copy(update={"summary": f"not registered yet: {error.problem}"})

    def is_valid(self, state: RunState, output: RegisterOutput) -> bool:
        """Whether the registry has the version; it may have been deleted."""
        return output.version is not None and registry.has_version(
            state.locations.tracking_uri, output.model, output.version
        )


def _registration(context: Context, previous: schema.Member | None) -> Registration:
    """What the version of the current model gets; writes the model card beside the weights. previous: the model of the family
    that it was cut from; None for the teacher."""
    teacher = context.output(Teacher)
    distilled = context.output(Distill)
    evaluated = context.output(Evaluate)
    figures = VersionFigures(
        heldout=context.output(Targets).fingerprint,
        student=_measured(context, evaluated, "distilled"),
        teacher=_measured(context, evaluated, "teacher"),
        pruned=_measured(context, evaluated, "pruned"),
    )
    card = model_card(context)
    context.check_fences()
    storage.write_bytes(storage.join(distilled.student, CARD), str(card).encode())
    return Registration(
        parent=previous.model if previous else None,
        description=description(card),
        tags={
            GATES_TAG: context.recipe.register_as.gates.model_dump_json(),
            "minitron.version": minitron.__version__,
            "minitron.recipe": context.recipe.name,
            "minitron.run": context.run_key,
            PATH_TAG: path_inside(context.locations.storage, distilled.student),
            "minitron.teacher": context.recipe.teacher.model,
            "minitron.teacher_sha256": json.dumps(teacher.sha256, sort_keys=True),
            "minitron.teacher_corrected": str(context.output(Correct).corrected),
            "minitron.losses": json.dumps(distilled.losses, sort_keys=True),
            "minitron.architecture": json.dumps(distilled.architecture.to_dict(), sort_keys=True),
            "minitron.parameters": str(distilled.parameters),
            "minitron.data": ", ".join(source.label for source in text_sources(context.recipe.data).values()),
            "minitron.data_sha256": context.output(Data).train,
            "minitron.tokens": str(distilled.tokens),
            **registry.figure_tags(figures),
        },
        metrics=_metrics(evaluated),
        params={
            "teacher": context.recipe.teacher.model,
            "architecture": str(distilled.architecture),
            "tokens": str(distilled.tokens),
            "run": context.run_key,
            **{f"{task}.measured_on": score.settings for task, score in figures.student.tasks.items()},
        },
        record=context.record_key(Register.name, context.member),
        registry=None if context.locations.uses_own_database else redact(context.locations.tracking_uri),
    )


def _metrics(evaluated: EvaluateOutput) -> dict[str, float]:
    """The figures of the student, and under "teacher." the same of the teacher, that MLflow shows on the model's page."""
    metrics: dict[str, float] = {}
    for prefix, model in (("", "distilled"), ("teacher.", "teacher")):
        figures = evaluated.table[model]
        values: dict[str, float | None] = {**figures.numbers}
        values |= score_metrics(figures.tasks)
        metrics |= {f"{prefix}{name}": value for name, value in values.items() if value is not None}
    return metrics


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
