"""Students as MLflow's logged models, whose pages show figures beside parameters and the run that made them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minitron_platform.tracking.events import mlflow_name
from minitron_platform.tracking.version_weights import MANIFEST_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

VERSIONS_TAG = "mlflow.modelVersions"  # by which MLflow's page of a logged model links the registered versions
REFUSED = re.compile("[/:.%\"']")  # in the name of a logged model; that of a registered one may have dots


@dataclass(frozen=True)
class ModelFigures:
    """What the page of a logged model shows."""

    run_id: str
    """The MLflow run that its figures belong to."""
    metrics: Mapping[str, float]
    params: Mapping[str, str] = field(default_factory=dict)


def find_or_create(
    client: MlflowClient,
    name: str,
    run_id: str | None,
    tags: Mapping[str, str],
    params: Mapping[str, str] | None = None,
) -> LoggedModel:
    """The logged model of the weights whose manifest is in `tags`, in the experiment of the run that made it.

    name: of the registered model; the logged one has `_` for characters that MLflow refuses there.
    """
    experiment = client.get_run(run_id).info.experiment_id if run_id else "0"
    models = client.search_logged_models([experiment], f"tags.`{MANIFEST_TAG}` = '{tags[MANIFEST_TAG]}'")
    if models:
        return models[0]
    shown = {mlflow_name(key): value for key, value in (params or {}).items()}
    name = REFUSED.sub("_", name)
    return client.create_logged_model(experiment, name, source_run_id=run_id, tags=dict(tags), params=shown)


def complete(client: MlflowClient, model_id: str, figures: ModelFigures, name: str, version: str) -> None:
    """Give a logged model its figures and the link to a registered version, as far as it lacks them, and mark it as ready."""
    from mlflow.entities import Metric

    model = client.get_logged_model(model_id)
    known = {metric.key: metric.value for metric in sorted(model.metrics or (), key=lambda each: each.timestamp)}
    new = {mlflow_name(key): float(value) for key, value in figures.metrics.items()}
    now = time.time_ns() // 1_000_000
    points = [Metric(k, value, now, 0, model_id=model_id) for k, value in new.items() if known.get(k) != value]
    if points:
        client.log_batch(figures.run_id, points)
    link: dict[str, Any] = {"name": name, "version": version}
    linked = json.loads(model.tags.get(VERSIONS_TAG, "[]"))
    if link not in [{**each, "version": str(each["version"])} for each in linked]:
        client.set_logged_model_tags(model_id, {VERSIONS_TAG: json.dumps([*linked, link])})
    if str(model.status) != "READY":
        client.finalize_logged_model(model_id, "READY")
