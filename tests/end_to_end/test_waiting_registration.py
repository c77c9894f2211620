"""MLflow is away when a run ends: the student, its report and its records are kept, and it is registered later."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.command import minitron_here
from helpers.finished_run import STAGES, results, reused
from helpers.mlflow_server import free_port, mlflow_server
from mlflow import MlflowClient


@pytest.fixture
def folder(finished, tmp_path):
    """A recipe and the storage of its finished run; with another tracking server only the registration is left to do."""
    folder = finished.copy(tmp_path)
    (report,) = (folder / "runs" / "runs").glob("*/report.html")
    report.unlink()
    return folder


def run(folder, address, *arguments):
    return minitron_here("run", "recipe.yaml", "--storage", "runs", "--tracking-uri", address, *arguments, cwd=folder)


def run_without_mlflow(folder, address, *arguments):
    """The same, where MLflow is away: the registration waits for its answer for a moment only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minitron_platform.pipeline.ANSWER_SECONDS", 0.3)
        patch.setattr("minitron_platform.tracking.flusher.LAST_PAUSE", 0.1)
        return run(folder, address, *arguments)


def report(folder):
    (path,) = (folder / "runs" / "runs").glob("*/report.html")
    return path.read_text()


def test_a_server_that_is_away_from_start_to_end_is_given_everything_by_sync(folder, empty_database):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    done = run_without_mlflow(folder, address, "--set", "tracking=best-effort")
    assert done.returncode == 0, done.stderr
    assert reused(done) == len(STAGES) - 1
    assert "tiny-student: not in the registry, because MLflow did not take it; all else is finished" in done.stdout
    assert "To register it, check that MLflow answers, and run `minitron sync`" in done.stdout
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

        assert "nothing to send" in (
            minitron_here("sync", "--storage", "runs", "--tracking-uri", address, cwd=folder).stdout
        )
        again = run(folder, address)
        assert reused(again) == len(STAGES), again.stdout + again.stderr
        assert len(client.search_model_versions("name='tiny-student'")) == 1


def test_without_best_effort_the_run_fails_after_its_report_and_the_next_run_registers(folder, empty_database):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    done = run_without_mlflow(folder, address)
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


def test_a_sync_that_cannot_register_one_run_says_why_and_goes_on_with_the_others(folder, empty_database):
    away = f"http://127.0.0.1:{free_port()}"
    assert run_without_mlflow(folder, away).returncode == 2
    (own,) = (folder / "runs" / "runs").iterdir()
    before = (own / "results.json").read_bytes()
    (stage,) = [
        p for p in (folder / "runs" / "stages" / "register").glob("*/stage.json") if '"version": null' in p.read_text()
    ]
    waiting = stage.read_text()

    def sync(*arguments):
        return minitron_here("sync", "--storage", "runs", *arguments, cwd=folder)

    # the address of the run is forgotten
    default = sync()
    assert default.returncode == 2
    assert f"tiny-student, not registered yet: it waits for MLflow at {away}, not for sqlite:///" in default.stdout
    assert "--tracking-uri" in default.stdout

    # edited by hand
    other = folder / "other"
    other.mkdir()
    shutil.copy(empty_database, other)
    database = f"sqlite:///{other}/mlflow.db"
    edited = json.loads(waiting)
    edited["outputs"]["waiting"] = None
    stage.write_text(json.dumps(edited))
    refused = sync("--tracking-uri", database)
    assert refused.returncode == 2
    assert "the output of the stage is missing or of an earlier version; run the recipe again" in refused.stdout
    stage.write_text(waiting)

    # another run is damaged
    damaged = shutil.copytree(own, own.with_name("a-" + own.name))
    (damaged / "results.json").write_text("{")
    mixed = sync("--tracking-uri", database)
    assert mixed.returncode == 2
    assert f"{damaged.name}: students may wait to be registered" in mixed.stderr
    assert "results.json: not valid JSON" in mixed.stdout
    assert "✓ tiny-student version 1 as 'candidate'" in mixed.stdout
    shutil.rmtree(damaged)
    assert results(folder)["register"]["version"] == "1"

    # killed after the registration, before the report
    (own / "results.json").write_bytes(before)
    assert sync("--tracking-uri", database).returncode == 0
    assert results(folder)["register"]["version"] == "1"

    # nothing waits, and a stage was deleted
    shutil.rmtree(folder / "runs" / "stages" / "targets")
    assert "nothing to send" in sync("--tracking-uri", database).stdout
