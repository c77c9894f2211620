"""Register: the student becomes a version in the MLflow registry, with its lineage."""

from __future__ import annotations

import json
from typing import Any

import minitron
from minitron.errors import StorageError
from minitron.evaluation import task_metric
from minitron_platform.recipes.schema import Member
from minitron_platform.stages.context import Context
from minitron_platform.stages.stage_records import INSIDE, relative
from minitron_platform.tracking import registry
from minitron_platform.tracking.flusher import shown, sqlite_path
from minitron_platform.tracking.registry import TASK_TAG

VERSION = 2


def inputs(context: Context) -> dict[str, Any]:
    return {
        "student": context.done["distill"]["id"],
        "evaluate": context.done["evaluate"]["fingerprint"],
        "model": context.member.model,
        "register": context.recipe.register_as.model_dump(),
        "tracking": _tracking(context),
        # with a benchmark that failed it is registered once more, as the same version, when that has its score
        **({"failed": sorted(failed)} if (failed := _failed(context)) else {}),
    }


def _tracking(context: Context) -> str:
    """The registry, told from others wherever the storage lies that it may be part of."""
    database = sqlite_path(context.places.tracking_uri)
    return context.places.tracking_uri if database is None else relative(context.places.local, str(database))


def _failed(context: Context) -> dict[str, str]:
    """The student's benchmarks that failed, with the reasons."""
    failures: dict[str, str] = context.done["evaluate"]["table"]["distilled"].get("failures", {})
    return failures


def holds(context: Context, outputs: dict[str, Any]) -> bool:
    """Whether the registry, which may have been deleted since, still has the version."""
    return registry.has_version(context.places.tracking_uri, outputs["model"], outputs["version"])


def run(context: Context, folder: str) -> dict[str, Any]:
    done, settings = context.done, context.recipe.register_as
    name, origin = context.member.model, context.recipe.origin(context.member)
    quality = done["evaluate"]["table"]["distilled"]
    tags = {
        "minitron.version": minitron.__version__,
        "minitron.recipe": context.recipe.name,
        "minitron.run": context.run_key,
        registry.PATH_TAG: relative(context.places.storage, done["distill"]["student"]).removeprefix(INSIDE),
        "minitron.teacher": context.recipe.teacher.model,
        "minitron.teacher_sha256": json.dumps(done["teacher"]["sha256"], sort_keys=True),
        "minitron.teacher_corrected": str(done["correct"]["corrected"]),
        "minitron.cut_from": _version(context, origin) if origin else "teacher",
        "minitron.losses": json.dumps(done["distill"]["losses"], sort_keys=True),
        "minitron.architecture": json.dumps(done["distill"]["architecture"], sort_keys=True),
        "minitron.parameters": str(done["distill"]["parameters"]),
        "minitron.data": f"{context.recipe.data.kind} {context.recipe.data.path}".strip(),
        "minitron.data_sha256": done["data"]["train"],
        "minitron.tokens": str(done["distill"]["tokens"]),
        "minitron.heldout_loss": f"{quality['loss']:.6f}",
        "minitron.heldout_kl": f"{quality['kl']:.6f}",
        **{
            f"{TASK_TAG}{task}": task_metric(task, s["metric"]).sentence(s["value"], s["stderr"])
            for task, s in quality["tasks"].items()
        },
        **{f"{TASK_TAG}{task}": f"failed: {reason}" for task, reason in _failed(context).items()},
    }
    run_id = context.mlflow_run(context.run_key)
    if run_id is None:
        raise StorageError(
            f"MLflow at {shown(context.places.tracking_uri)} has not taken the run's record within 30 s",
            "check that the server answers, end drivers of this run that hang on this machine, and run again: all else is "
            "done",
        )
    version = registry.register(
        context.places.tracking_uri,
        name=name,
        source=done["distill"]["student"],
        run_id=run_id,
        tags=tags,
        description=f"{context.recipe.teacher.model} pruned to {done['distill']['parameters']:,} parameters and distilled",
        alias=settings.alias,
    )
    return {
        "model": name,
        "version": version,
        "alias": settings.alias,
        "source": done["distill"]["student"],
        "summary": f"{name} version {version} as {settings.alias!r}",
    }


def _version(context: Context, member: Member) -> str:
    registered = context.family[member.model]["register"]
    return f"{registered['model']} version {registered['version']}"
