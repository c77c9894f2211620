"""MLflow is away when a run ends: the student, its report and its records are kept, and it is registered later."""

from __future__ import annotations

import shutil

import pytest
from helpers.command import minitron_here
from helpers.finished_run import STAGES, results, reused
from helpers.mlflow_server import free_port, mlflow_server
from mlflow import MlflowClient


@pytest.fixture
def impatient(monkeypatch):
    """A registration waits for MLflow's answer for a moment only."""
    monkeypatch.setattr("minitron_platform.pipeline.ANSWER_SECONDS", 0.3)
    monkeypatch.setattr("minitron_platform.tracking.flusher.LAST_PAUSE", 0.1)


@pytest.fixture
def folder(finished, tmp_path):
    """A recipe and the storage of its finished run; with another tracking server only the registration is left to do."""
    folder = finished.copy(tmp_path)
    (report,) = (folder / "runs" / "runs").glob("*/report.html")
    report.unlink()
    return folder


def run(folder, address, *arguments):
    return minitron_here("run", "recipe.yaml", "--storage", "runs", "--tracking-uri", address, *arguments, cwd=folder)


def report(folder):
    (path,) = (folder / "runs" / "runs").glob("*/report.html")
    return path.read_text()


def test_a_server_that_is_away_from_start_to_end_is_given_everything_by_sync(folder, empty_database, impatient):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    done = run(folder, address, "--set", "tracking=best-effort")
    assert done.returncode == 0, done.stderr
    assert reused(done) == len(STAGES) - 1
    assert "tiny-student: not in the registry, because MLflow did not take it; all else is finished" in done.stdout
    assert "To register it, check that MLflow answers, then run `minitron sync`" in done.stdout
    assert "Promote" not in done.stdout
    written = results(folder)["register"]
    assert written["version"] is None
    assert "tiny-student, not registered yet" in report(folder)

    away = minitron_here("sync", "--storage", "runs", "--tracking-uri", address, cwd=folder)
    assert away.returncode == 2
    assert "does not answer" in away.stderr

    served = folder / "server"
    served.mkdir()
    shutil.copy(empty_database, served)
    with mlflow_server(served, port):
        sync = minitron_here("sync", "--storage", "runs", "--tracking-uri", address, cwd=folder)
        assert sync.returncode == 0, sync.stderr
        assert "✓ tiny-student version 1 as 'candidate'" in sync.stdout
        client = MlflowClient(address)
        version = client.get_model_version_by_alias("tiny-student", "candidate")
        assert version.tags["minitron.cut_from"] == "teacher"
        assert (version.description or "").startswith("# tiny-student")
        runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
        own = {r.data.tags["minitron.key"].partition(".")[2]: r for r in runs}
        assert own[""].info.run_id == version.run_id
        assert {r.info.status for r in runs} == {"FINISHED"}
        assert own["register"].data.params["version"] == "1"
        artifacts = {a.path for a in client.list_artifacts(version.run_id)}
        assert {"report.html", "results.json", "recipe.yaml"} <= artifacts
        assert results(folder)["register"]["version"] == "1"
        assert "tiny-student version 1" in report(folder)

        assert "MLflow has all records" in (
            minitron_here("sync", "--storage", "runs", "--tracking-uri", address, cwd=folder).stdout
        )
        again = run(folder, address)
        assert reused(again) == len(STAGES), again.stdout + again.stderr
        assert len(client.search_model_versions("name='tiny-student'")) == 1


def test_without_best_effort_the_run_fails_after_its_report_and_the_next_run_registers(
    folder, empty_database, impatient
):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    done = run(folder, address)
    assert done.returncode == 2
    assert "tiny-student: not in the registry" in done.stderr
    assert "minitron sync" in done.stderr
    assert "not registered yet" in report(folder)
    served = folder / "server"
    served.mkdir()
    shutil.copy(empty_database, served)
    with mlflow_server(served, port):
        again = run(folder, address)
        assert again.returncode == 0, again.stdout + again.stderr
        assert reused(again) == len(STAGES) - 1
        client = MlflowClient(address)
        assert client.get_model_version_by_alias("tiny-student", "candidate").version == "1"
        runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
        assert {r.info.status for r in runs} == {"FINISHED"}
    assert "tiny-student version 1" in report(folder)
