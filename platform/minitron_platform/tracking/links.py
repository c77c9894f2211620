"""Addresses of pages in MLflow's web interface, which would open on traces of applications without `TRAINING`."""

from __future__ import annotations

from minitron_platform.tracking.mlflow_runs import KIND_TAG, RUN_KIND

TRAINING = "workflowType=machine_learning"  # the tag of an experiment alone does not decide which menu it opens with


def experiments_link(address: str) -> str:
    """The page of all experiments. address: of MLflow's server."""
    return f"{address.rstrip('/')}/#/experiments?{TRAINING}"


def newest_run_links(tracking_uri: str, address: str) -> tuple[str, str] | None:
    """The pages of the experiment with the newest run of a recipe, and of that run's report; None without a run.

    tracking_uri: MLflow's database. address: of the server that shows it.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    newest = client.search_runs(
        experiments, f"tags.`{KIND_TAG}` = '{RUN_KIND}'", order_by=["attributes.start_time DESC"], max_results=1
    )
    if not newest:
        return None
    info = newest[0].info
    runs = f"{address.rstrip('/')}/#/experiments/{info.experiment_id}/runs"
    return f"{runs}?{TRAINING}", f"{runs}/{info.run_id}/artifacts/report.html?{TRAINING}"
