"""The MLflow run of a variant, which its figures belong to: nested in that of its parent."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from minitron_platform.stages.evaluate import HELDOUT, Quality, score_metrics
from minitron_platform.tracking import mlflow_runs
from minitron_platform.tracking.lineage import title
from minitron_platform.tracking.logged_models import ModelFigures
from minitron_platform.tracking.variant_tags import Kind
from minitron_platform.tracking.version_figures import VersionFigures
from minitron_platform.tracking.version_weights import MANIFEST_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

MODEL_TAG = "minitron.model"


def run_of_variant(client: MlflowClient, parent: Any, name: str, kind: Kind, manifest_sha256: str) -> str | None:
    """The MLflow run of a variant, created if there is none; None if its parent has none that still exists."""
    from mlflow.exceptions import MlflowException

    if not parent.run_id:
        return None
    try:
        experiment = client.get_run(parent.run_id).info.experiment_id
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        log.warning("the MLflow run of %s was deleted, so that %s has none", title(parent), name)
        return None
    found = client.search_runs(
        [experiment], f"tags.`{MANIFEST_TAG}` = '{manifest_sha256}' and tags.`{MODEL_TAG}` = '{name}'", max_results=1
    )
    if found:
        return str(found[0].info.run_id)
    tags = {
        mlflow_runs.KIND_TAG: "variant",
        MANIFEST_TAG: manifest_sha256,
        MODEL_TAG: name,
        "mlflow.parentRunId": parent.run_id,
    }
    run_id = str(client.create_run(experiment, run_name=f"{name}, {kind}", tags=tags).info.run_id)
    client.set_terminated(run_id)
    return run_id


def model_figures(
    run_id: str, quality: Quality, figures: VersionFigures, parameters: int, parent: Any, kind: Kind
) -> ModelFigures:
    """What the page of its logged model shows: its figures, and under "parent." those of its parent."""
    metrics: dict[str, float | None] = {
        "parameters": parameters,
        **{field: getattr(quality, field) for field in HELDOUT},
    }
    for prefix, measured in (("", figures.student), ("parent.", figures.parent)):
        if measured is None:
            continue
        if prefix:
            metrics |= {f"{prefix}loss": measured.loss, f"{prefix}kl": measured.kl}
        metrics |= score_metrics(measured.tasks, prefix)
    known = {name: value for name, value in metrics.items() if value is not None}
    return ModelFigures(run_id, known, {"parent": title(parent), "kind": kind})
