"""The spool of a run reaches MLflow once and in order, and tracking never stops the run. Real spool, real MLflow."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.mlflow_server import environment, free_port, mlflow_server

from minitron.errors import InputError
from minitron_platform.tracking.flusher import Flusher, prepare_mlflow
from minitron_platform.tracking.spool import RunLog

EXPERIMENT = "tiny family"


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, whose creation takes a second or more; most tests copy it."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    Flusher(str(file.parent / "spool"), f"sqlite:///{file}", "another experiment").close(60)
    return file


@pytest.fixture
def uri(tmp_path: Path, empty_database: Path) -> str:
    (tmp_path / "store").mkdir()
    shutil.copy(empty_database, tmp_path / "store")
    return f"sqlite:///{tmp_path}/store/mlflow.db"


@pytest.fixture
def new_uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/new/mlflow.db"


@pytest.fixture
def spool(tmp_path: Path) -> str:
    return str(tmp_path / "spool")


def runs(uri: str) -> dict[str, Any]:
    """All runs of the experiment by key; fails if two runs have the same key."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    by_key = {run.data.tags["minitron.key"]: run for run in found}
    assert len(by_key) == len(found)
    return by_key


def points(uri: str, run: Any, name: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    return [(point.step, point.value) for point in MlflowClient(uri).get_metric_history(run.info.run_id, name)]


def flush(spool: str, uri: str) -> Flusher:
    flusher = Flusher(spool, uri, EXPERIMENT, interval=0.2)
    assert flusher.close(60) == 0
    return flusher


def test_children_are_nested_and_everything_arrives(spool: str, uri: str, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("card")
    with Flusher(spool, uri, EXPERIMENT, interval=0.2) as flusher:
        child = RunLog(spool, "a-trial")  # sorts before its parent, and starts before it
        child.start("trial 1", parent="search")
        child.metrics({"lm/acc,none": 0.5, "kl": math.nan, "loss": math.inf}, step=3)
        parent = RunLog(spool, "search")
        parent.start("the search", tags={"gpus": 8})
        parent.params({"lr": 1e-4, "long": "x" * 9000})
        parent.artifact(str(tmp_path / "card.md"), "cards")
        child.end("FAILED")
        run_id = flusher.wait_for("a-trial", 60)
    by_key = runs(uri)
    assert by_key["a-trial"].info.run_id == run_id == flusher.run_ids()["a-trial"]
    tags = by_key["a-trial"].data.tags
    assert tags["mlflow.parentRunId"] == by_key["search"].info.run_id
    assert (by_key["a-trial"].info.run_name, by_key["a-trial"].info.status) == ("trial 1", "FAILED")
    assert by_key["a-trial"].data.metrics["lm/acc_none"] == 0.5
    assert math.isnan(by_key["a-trial"].data.metrics["kl"])
    assert "loss" not in by_key["a-trial"].data.metrics
    assert tags["loss.nonfinite"] == "inf at step 3"
    assert by_key["search"].data.params == {"lr": "0.0001", "long": "x" * 6000}
    assert (by_key["search"].info.status, by_key["search"].data.tags["gpus"]) == ("RUNNING", "8")
    stored = Path(by_key["search"].info.artifact_uri) / "cards" / "card.md"
    assert stored.read_text() == "card"
    assert stored.is_relative_to(tmp_path / "store")


def test_an_outage_of_mlflow_loses_no_metric_and_delays_nothing(
    spool: str, uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    run = RunLog(spool, "run")
    with Flusher(spool, address, EXPERIMENT, interval=0.2) as flusher:
        run.start("run")
        run.params({"seed": 1})
        slowest = 0.0
        for step in range(1500):
            began = time.perf_counter()
            run.metrics({"loss": 1 / (step + 1), "lr": 0.5}, step)
            slowest = max(slowest, time.perf_counter() - began)
        assert flusher.wait_for("run", 1.0) is None
        with mlflow_server(tmp_path / "store", port):
            assert flusher.wait_for("run", 60) is not None
            run.end()
            assert flusher.close(60) == 0
            assert points(address, runs(address)["run"], "loss") == [(s, 1 / (s + 1)) for s in range(1500)]
            assert len(points(address, runs(address)["run"], "lr")) == 1500
            (Path(spool) / ".sent.json").unlink()  # as after a crash between sending and committing
            flush(spool, address)
            assert len(points(address, runs(address)["run"], "loss")) == 1500
            assert runs(address)["run"].info.status == "FINISHED"
    said = [record.message for record in caplog.records if record.name == "minitron_platform.tracking.flusher"]
    assert len(said) == 2, said
    assert "events are kept in" in said[0]
    assert "answers again" in said[1]
    assert slowest < 5  # seconds; the client itself would wait four minutes


def test_unsent_events_are_counted_and_sent_by_the_next_run(spool: str, uri: str) -> None:
    run = RunLog(spool, "run")
    run.start("run")
    run.metrics({"loss": 1.0}, 1)
    down = Flusher(spool, f"http://127.0.0.1:{free_port()}", EXPERIMENT, interval=0.1)
    assert down.close(30) == 2
    flush(spool, uri)
    assert points(uri, runs(uri)["run"], "loss") == [(1, 1.0)]


def test_a_rerun_sends_nothing_and_a_restart_continues_the_same_run(spool: str, uri: str) -> None:
    run = RunLog(spool, "run")
    run.start("run")
    run.params({"lr": 1, "seed": 7})
    run.metrics({"loss": 2.0}, 1)
    run.end("FAILED")
    first = flush(spool, uri).run_ids()
    assert runs(uri)["run"].info.status == "FAILED"
    state = (Path(spool) / ".sent.json").stat().st_mtime_ns
    flush(spool, uri)
    assert (Path(spool) / ".sent.json").stat().st_mtime_ns == state

    run.start("run, again")
    run.params({"lr": 2, "seed": 7})
    run.metrics({"loss": 1.0}, 2)
    assert flush(spool, uri).run_ids() == first
    again = runs(uri)["run"]
    assert (again.info.status, again.info.run_name) == ("RUNNING", "run, again")
    assert points(uri, again, "loss") == [(1, 2.0), (2, 1.0)]
    assert again.data.params == {"lr": "1", "seed": "7"}  # MLflow keeps the first value
    assert again.data.tags["changed.lr"] == "2"


DRIVER = """
import sys, time
from minitron_platform.tracking.spool import RunLog
from minitron_platform.tracking.flusher import Flusher
spool, uri = sys.argv[1:]
flusher = Flusher(spool, uri, "tiny family", interval=0.05)
parent, child = RunLog(spool, "search"), RunLog(spool, "trial")
parent.start("search")
child.start("trial", parent="search")
for step in range(int(sys.stdin.readline())):
    child.metrics({"loss": float(step)}, step)
    time.sleep(0.002)
flusher.wait_for("trial", 60)
print("sent", flush=True)
while True:
    step += 1
    child.metrics({"loss": float(step)}, step)
"""


def test_there_is_one_run_per_key_after_a_driver_was_killed(spool: str, uri: str) -> None:
    for _ in range(2):
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, spool, uri],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert driver.stdin is not None
        assert driver.stdout is not None
        driver.stdin.write("100\n")
        driver.stdin.flush()
        assert driver.stdout.readline() == "sent\n"
        time.sleep(0.3)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    with open(f"{spool}/trial.jsonl", "ab") as file:
        file.write(b'{"t": 5, "event": "met')  # killed in the middle of a line
    RunLog(spool, "trial").end()
    state = json.loads((Path(spool) / ".sent.json").read_text())
    state["offsets"]["trial"] = state["offsets"]["trial"] // 2  # killed before the commit: the batch goes out twice
    state["offsets"]["trial"] = (Path(spool) / "trial.jsonl").read_bytes().index(b"\n", state["offsets"]["trial"]) + 1
    (Path(spool) / ".sent.json").write_text(json.dumps(state))
    flusher = flush(spool, uri)
    assert flusher.refused() == 1  # only the incomplete line
    by_key = runs(uri)
    assert sorted(by_key) == ["search", "trial"]
    assert by_key["trial"].info.status == "FINISHED"
    assert by_key["trial"].data.tags["mlflow.parentRunId"] == by_key["search"].info.run_id
    lines = (Path(spool) / "trial.jsonl").read_text().splitlines()
    written = [json.loads(line)["step"] for line in lines if '"metrics"' in line]
    assert sorted(step for step, _ in points(uri, by_key["trial"], "loss")) == sorted(written)


def test_an_invalid_event_does_not_stop_the_others(spool: str, uri: str) -> None:
    run = RunLog(spool, "run")
    run.start("run")
    run.metrics({"loss": 3.0, "a/../b": 1.0}, 1)  # MLflow refuses this name
    run.artifact(f"{spool}/never-written")
    run.metrics({"loss": 2.0}, 2)
    assert flush(spool, uri).refused() == 2
    assert points(uri, runs(uri)["run"], "loss") == [(1, 3.0), (2, 2.0)]


def test_a_spool_uploads_nothing_from_outside_the_runs_folder_and_only_its_owner_reads_it(
    spool: str, uri: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Others may write to a spool on a shared disk, and MLflow's artifacts are read by all."""
    from mlflow import MlflowClient

    secret = tmp_path_factory.mktemp("home") / "id_rsa"
    secret.write_text("private")
    (tmp_path / "link.txt").symlink_to(secret)
    (tmp_path / "report.html").write_text("report")
    run = RunLog(spool, "run")
    run.start("run")
    for path, folder in ((secret, ""), (tmp_path / "link.txt", ""), (tmp_path / "report.html", "../../outside")):
        run.artifact(str(path), folder)
    run.artifact(str(tmp_path / "report.html"))
    flusher = flush(spool, uri)
    assert flusher.refused() == 3
    uploaded = MlflowClient(uri).list_artifacts(flusher.run_ids()["run"])
    assert [file.path for file in uploaded] == ["report.html"]
    private = [Path(spool) / "run.jsonl", Path(spool) / ".lock", Path(uri.removeprefix("sqlite:///"))]
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
    assert Path(spool).stat().st_mode & 0o777 == 0o700


def test_a_run_that_was_deleted_in_mlflow_stays_deleted_until_it_starts_again(spool: str, uri: str) -> None:
    from mlflow import MlflowClient

    run = RunLog(spool, "run")
    run.start("run")
    deleted = flush(spool, uri).run_ids()["run"]
    MlflowClient(uri).delete_run(deleted)
    run.metrics({"loss": 2.0}, 1)
    assert flush(spool, uri).refused() == 1
    run.start("run")
    run.metrics({"loss": 1.0}, 2)
    assert flush(spool, uri).run_ids()["run"] != deleted
    assert points(uri, runs(uri)["run"], "loss") == [(2, 1.0)]


def test_a_deleted_database_is_filled_again(spool: str, uri: str, tmp_path: Path) -> None:
    run = RunLog(spool, "run")
    run.start("run")
    run.metrics({"loss": 1.0}, 1)
    flush(spool, uri)
    other = f"sqlite:///{tmp_path}/other/mlflow.db"
    flush(spool, other)
    assert points(other, runs(other)["run"], "loss") == [(1, 1.0)]


def test_two_drivers_create_one_database_and_one_run(spool: str, new_uri: str) -> None:
    RunLog(spool, "run").start("run")
    code = "import sys; from minitron_platform.tracking.flusher import Flusher; print(Flusher(*sys.argv[1:]).close(60))"
    command = [sys.executable, "-c", code, spool, new_uri, EXPERIMENT]
    drivers = [subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    other = subprocess.Popen([*command[:3], f"{spool}-2", *command[4:]], env=environment(), stdout=subprocess.PIPE)
    for driver in [*drivers, other]:
        driver.communicate(timeout=120)
        assert driver.returncode == 0
    flush(spool, new_uri)
    assert list(runs(new_uri)) == ["run"]


def test_lines_of_concurrent_writers_are_not_mixed(spool: str) -> None:
    def write(writer: int) -> None:
        for step in range(200):
            RunLog(spool, "run").metrics({f"loss{writer}": 1.0}, step)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [line for line in (Path(spool) / "run.jsonl").read_text().splitlines() if line]
    assert len([json.loads(line) for line in lines]) == 800


def test_a_spool_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "spool").write_text("a file where the folder should be")
    run = RunLog(str(tmp_path / "spool"), "run")
    run.start("run")
    run.metrics({"loss": 1.0}, 1)
    assert run.lost == 2
    assert len(caplog.records) == 1


def test_unusable_settings_are_refused_immediately(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'a/b'"):
        RunLog(str(tmp_path), "a/b")
    with pytest.raises(InputError, match="s3://"):
        RunLog("s3://bucket/spool", "run")
    with pytest.raises(InputError, match="mlruns"):
        prepare_mlflow(str(tmp_path / "mlruns"))
    with pytest.raises(InputError, match="has no file name"):
        prepare_mlflow("sqlite:///:memory:")
    with pytest.raises(InputError) as refused:
        prepare_mlflow("oracle://user:hunter2@db/mlflow")
    assert "hunter2" not in str(refused.value)


def test_a_database_is_created_again_if_its_creation_was_killed(tmp_path: Path) -> None:
    # Creating the tables takes seconds: a process that is killed meanwhile must not leave an unusable file.
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    program = f"from minitron_platform.tracking.flusher import *\nprepare_mlflow({uri!r})\ncreate_database({uri!r})"
    maker = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    while not list(tmp_path.glob(".mlflow.db.*/new.db")):
        assert maker.poll() is None
        time.sleep(0.01)
    maker.kill()
    maker.wait()
    assert not (tmp_path / "mlflow.db").exists()
    with Flusher(str(tmp_path / "spool"), uri, "experiment") as flusher:
        RunLog(str(tmp_path / "spool"), "run").start("run")
        assert flusher.wait_for("run", timeout=60)
