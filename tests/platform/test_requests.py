"""Requests of stages and of a trial to an object store, counted by a real server.

`benchmarks.storage_requests` counts those of a whole run.
"""

from __future__ import annotations

import shutil
from collections import Counter
from urllib.parse import unquote

import pytest
import s3fs
from helpers.s3_server import s3_server

from minitron_platform import load_recipe, plan, run
from minitron_platform.recipes.build import distill_config, logit_losses
from minitron_platform.stages.targets import distill_inputs, pruning_source
from minitron_platform.uploads import with_uploads
from minitron_search.search_task import SearchTask
from minitron_search.trial import run_trial

STAGES = ("teacher", "data", "correct", "calibrate", "targets")


class Requests:
    """Requests since the last call of `new`, without those of the records for MLflow, which are sent at intervals of time."""

    def __init__(self, log):
        self.log, self.seen = log, 0

    def new(self):
        lines = self.log.read_text().splitlines()
        new, self.seen = lines[self.seen :], len(lines)
        return [line for line in new if "m/runs/" not in unquote(line)]


def _at_most(limit, requests):
    """Fails with the most frequent requests if there are more than `limit`."""
    assert len(requests) <= limit, Counter(requests).most_common(20)


@pytest.fixture
def requests(tmp_path, monkeypatch):
    log = tmp_path / "requests.log"
    log.touch()
    with s3_server(log) as variables:
        values = {**variables, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
        for name, value in {**values, "MINITRON_LEASE_SECONDS": "3600"}.items():  # one heartbeat of each lease
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem().mkdir("bucket")
        counted = Requests(log)
        counted.new()
        yield counted


def test_a_run_on_an_object_store_has_as_many_requests_as_planned_and_asks_for_nothing_often(
    bench, tmp_path, requests, empty_database
):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    recipe = load_recipe(str(bench / "recipe.yaml"))
    locations = {"storage_path": "s3://bucket/m", "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}
    costs = plan(recipe, **locations).costs
    _at_most(15, requests.new())
    result = run(recipe, **locations, until="targets")
    first = requests.new()
    _at_most(180, first)
    assert 0.5 < len(first) / sum(cost.estimate.requests for cost in costs if cost.stage in STAGES) < 2
    looks = [line for line in first if "leases" in line]  # at the leases of the run and of the stage, before each write
    assert len(looks) <= 70
    most, times = Counter(line for line in first if line not in looks).most_common(1)[0]
    assert times <= 8, most
    run(recipe, **locations, until="targets")
    _at_most(60, requests.new())

    state = result.state
    state.current = recipe.family[0]
    task = SearchTask(
        materials=distill_inputs(state),
        origin=pruning_source(state),
        config=distill_config(recipe.search.training),
        losses=logit_losses(recipe),
        folder="s3://bucket/m/trials/0",
        rungs=(3, 5),
    )
    requests.new()
    run_trial(task, plan(recipe, **locations).candidates["tiny-student"][0], lambda event: None)
    trial = requests.new()
    _at_most(130, trial)
    (search,) = [cost.estimate.requests for cost in costs if cost.stage == "search"]
    assert 0.5 < len(trial) / (search / 7) < 2


def test_nothing_is_uploaded_twice(bench, requests):
    recipe = load_recipe(str(bench / "recipe.yaml"))
    said = []
    uploaded = with_uploads(recipe, "s3://bucket/m", said.append)
    writes = [line for line in requests.new() if line.startswith(("PUT", "POST"))]
    assert len(writes) >= len(said) == 3  # teacher, text, benchmark
    assert with_uploads(recipe, "s3://bucket/m", said.append) == uploaded
    assert not [line for line in requests.new() if line.startswith(("PUT", "POST"))]
