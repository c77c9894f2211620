"""Records in an object store, which cannot append: few requests, and any machine goes on. Real S3 server, real MLflow."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from helpers.s3_server import s3_server

from minitron import storage
from minitron_platform.console import Console
from minitron_platform.locations import Locations
from minitron_platform.sync import sync
from minitron_platform.tracking import spool as spool_module
from minitron_platform.tracking.flusher import Flusher
from minitron_platform.tracking.spool import Spool

KEY = "tiny-1"
STEPS = 3000


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"


@pytest.fixture
def locations(bucket: str, tmp_path: Path, empty_database: Path) -> Locations:
    shutil.copy(empty_database, tmp_path)
    return Locations(f"{bucket}/minitron", str(tmp_path / "home"), f"sqlite:///{tmp_path}/mlflow.db")


def test_records_of_a_lost_machine_go_on_elsewhere_with_few_requests(
    locations: Locations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    writes: list[str] = []
    write_bytes = storage.write_bytes

    def counted(path: str, data: bytes, **options: bool) -> None:
        writes.append(path)
        write_bytes(path, data, **options)

    monkeypatch.setattr(storage, "write_bytes", counted)
    monkeypatch.setattr(spool_module, "REMOTE_SECONDS", 3600.0)
    monkeypatch.setattr(spool_module, "PART_BYTES", 100_000)
    lost = Spool(locations.spool(KEY), experiment="remote")
    lost.record(KEY).start(KEY)
    run = lost.record(f"{KEY}.distill")
    run.start("distill", parent=KEY, of="1f")
    storage.write_bytes(f"{locations.run(KEY)}/report.html", b"a report")
    lost.record(KEY).artifact(f"{locations.run(KEY)}/report.html")
    for step in range(STEPS):
        run.metrics({"loss": float(step), "speed": 1.0}, step)
        if step % 1000 == 999:
            lost.flush()  # as every few seconds
    for step in range(STEPS, STEPS + 10):
        run.metrics({"loss": float(step), "speed": 1.0}, step)
    del lost, run  # the machine is lost, with what was recorded last

    other = Spool(locations.spool(KEY), experiment="remote")
    run = other.record(f"{KEY}.distill")
    run.start("distill", parent=KEY, of="1f")
    for step in range(STEPS - 500, STEPS + 10):  # trained again from a checkpoint, at another speed
        run.metrics({"loss": float(step), "speed": 2.0}, step)
    run.end()
    other.record(KEY).end()
    with Flusher(other, locations.tracking_uri, "remote", interval=0.1):
        pass
    other.close()
    parts = [name for name in storage.names(locations.spool(KEY)) if name.endswith(".jsonl")]
    written = [path for path in writes if path.endswith(".jsonl")]
    assert len(parts) == 4  # 3 of the first machine, which wrote 3,000 steps, and 1
    assert 4 <= len(written) <= 5
    assert not (tmp_path / "home").exists()

    client = MlflowClient(locations.tracking_uri)
    experiment = client.get_experiment_by_name("remote")
    runs = {run.data.tags["minitron.key"]: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == [KEY, f"{KEY}.distill"]
    for name, value in (("loss", None), ("speed", 1.0)):
        history = client.get_metric_history(runs[f"{KEY}.distill"].info.run_id, name)
        assert [point.step for point in history] == list(range(STEPS + 10))
        if value:
            assert {point.value for point in history[:STEPS]} == {value}
    assert [file.path for file in client.list_artifacts(runs[KEY].info.run_id)] == ["report.html"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert sync(locations, Console()) == 0
