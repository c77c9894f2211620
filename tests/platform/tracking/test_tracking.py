"""The spool of a run reaches MLflow once and in order, and tracking never stops the run. Real spool, real MLflow."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers.mlflow_server import environment, free_port

from minitron.errors import InputError
from minitron_platform.tracking.flusher import Flusher, prepare_mlflow
from minitron_platform.tracking.restarts import Restart, record_restart
from minitron_platform.tracking.spool import RunLog, Spool

EXPERIMENT = "tiny family"


@pytest.fixture
def uri(tmp_path: Path, empty_database: Path) -> str:
    (tmp_path / "store").mkdir()
    shutil.copy(empty_database, tmp_path / "store")
    return f"sqlite:///{tmp_path}/store/mlflow.db"


@pytest.fixture
def new_uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/new/mlflow.db"


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(str(tmp_path / "spool"))
    yield spool
    spool.close()


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


def flush(spool: Spool, uri: str) -> Flusher:
    flusher = Flusher(spool, uri, EXPERIMENT, interval=0.2)
    assert flusher.close() == 0
    return flusher


def test_what_is_recorded_after_the_end_goes_into_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron_platform.tracking.spool.LAST_ATTEMPTS", 1)
    spool = Spool(str(tmp_path / "spool"))
    spool.record("search").start("search")
    spool.close()
    with ExitStack() as opened:
        # one has the number of the closed file; leaving the block raises for one that is closed
        others = [opened.enter_context(open(tmp_path / str(number), "w")) for number in range(20)]
        spool.record("search").tags({"late": 1})
        spool.close()
    assert spool.lost == 1
    assert {Path(other.name).read_bytes() for other in others} == {b""}


def test_children_are_nested_and_everything_arrives(spool: Spool, uri: str, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("card")
    with Flusher(spool, uri, EXPERIMENT, interval=0.2) as flusher:
        child = spool.record("a-trial")  # sorts before its parent, and starts before it
        child.start("trial 1", parent="search")
        child.metrics({"lm/acc,none": 0.5, "kl": math.nan, "loss": math.inf}, step=3)
        parent = spool.record("search")
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
    assert by_key["search"].info.run_name == "the search"
    stored = Path(by_key["search"].info.artifact_uri) / "cards" / "card.md"
    assert stored.read_text() == "card"
    assert stored.is_relative_to(tmp_path / "store")


def test_a_dataset_that_is_recorded_again_is_an_input_of_the_run_once(spool: Spool, uri: str) -> None:
    from mlflow import MlflowClient

    run = spool.record("run")
    run.start("run")
    for _ in range(2):
        run.dataset("text.jsonl", digest="1f", source="s3://bucket/rows", context="training", tokens=7)
        flush(spool, uri)
    stored = MlflowClient(uri).get_run(runs(uri)["run"].info.run_id).inputs.dataset_inputs
    ((dataset, tags),) = [(each.dataset, each.tags) for each in stored]
    assert (dataset.name, dataset.digest, json.loads(dataset.profile)) == ("text.jsonl", "1f", {"tokens": 7})
    assert json.loads(dataset.source) == {"uri": "s3://bucket/rows"}
    assert [(tag.key, tag.value) for tag in tags] == [("mlflow.data.context", "training")]


def test_unsent_events_are_counted_and_sent_by_the_next_run(spool: Spool, uri: str) -> None:
    run = spool.record("run")
    run.start("run")
    run.metrics({"loss": 1.0}, 1)
    down = Flusher(spool, f"http://127.0.0.1:{free_port()}", EXPERIMENT, interval=0.005)
    assert down.close() == 2
    flush(Spool(spool.folder), uri)
    assert points(uri, runs(uri)["run"], "loss") == [(1, 1.0)]


def test_a_rerun_sends_nothing_and_a_restart_continues_the_same_run(spool: Spool, uri: str) -> None:
    run = spool.record("run")
    run.start("run")
    run.params({"lr": 1, "seed": 7})
    run.metrics({"loss": 2.0}, 1)
    run.end("FAILED")
    first = flush(spool, uri).run_ids()
    assert runs(uri)["run"].info.status == "FAILED"
    files = {path: path.stat().st_mtime_ns for path in Path(spool.folder).iterdir()}
    flush(Spool(spool.folder), uri)
    assert {path: path.stat().st_mtime_ns for path in Path(spool.folder).iterdir()} == files

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
import sys
from minitron_platform.tracking.spool import Spool
from minitron_platform.tracking.flusher import Flusher
folder, uri, first = sys.argv[1:]
spool = Spool(folder)
flusher = Flusher(spool, uri, "tiny family", interval=0.05)
parent, child = spool.record("search"), spool.record("trial")
parent.start("search")
child.start("trial", parent="search")
for step in range(int(first), int(first) + 100):
    child.metrics({"loss": float(step), "seconds": float(first)}, step)
flusher.wait_for("trial", 60)
print("sent", flush=True)
while True:
    step += 1
    child.metrics({"loss": float(step), "seconds": float(first)}, step)
"""


def test_steps_that_a_killed_driver_recorded_and_the_next_repeats_are_in_mlflow_once(spool: Spool, uri: str) -> None:
    for first in (0, 50):  # the second driver trains again from step 50
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, spool.folder, uri, str(first)],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert driver.stdout is not None
        assert driver.stdout.readline() == "sent\n"
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    (second,) = sorted(Path(spool.folder).glob("000002.*.jsonl"))[-1:]
    with open(second, "ab") as file:
        file.write(b'{"t": 5, "event": "met')  # killed in the middle of a line
    for state in Path(spool.folder).glob("sent-*.json"):
        state.unlink()  # killed before the position was saved: everything is sent again
    after = Spool(spool.folder)
    after.record("trial").end()
    flusher = flush(after, uri)
    assert flusher.refused() == 0
    by_key = runs(uri)
    assert sorted(by_key) == ["search", "trial"]
    assert by_key["trial"].info.status == "FINISHED"
    assert by_key["trial"].data.tags["mlflow.parentRunId"] == by_key["search"].info.run_id
    written = points(uri, by_key["trial"], "loss")
    assert len(written) >= 150
    assert written == [(step, float(step)) for step in range(len(written))]
    assert [first for _, first in points(uri, by_key["trial"], "seconds")][:100] == [0.0] * 100


def test_steps_that_are_recorded_late_are_in_mlflow_in_order(
    spool: Spool, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(10**18, 10**9)  # a second later each time
    monkeypatch.setattr(time, "time_ns", lambda: next(clock))
    run = spool.record("run")
    run.start("run", of="this work")
    for step in (1, 2, 5, 6, 3, 4):
        run.metrics({"loss": float(step)}, step)
    run.metrics({"loss": 9.0}, 2)
    flush(spool, uri)
    assert points(uri, runs(uri)["run"], "loss") == [(step, float(step)) for step in range(1, 7)]
    run.start("run", of="this work, changed")  # what is measured now is new
    run.metrics({"loss": 0.5}, 2)
    flush(spool, uri)
    assert (2, 0.5) in points(uri, runs(uri)["run"], "loss")


def test_restarts_from_the_same_step_are_all_counted(spool: Spool, uri: str) -> None:
    run = spool.record("run")
    run.start("run")
    for number in (1, 2):
        record_restart(
            run, number, Restart("2026-01-01 00:00:00", "worker 1", "node", "killed", step=4, left=3 - number)
        )
    flush(spool, uri)
    data = runs(uri)["run"].data
    assert data.metrics["restarts"] == 2
    assert {"minitron.restart.1", "minitron.restart.2"} <= set(data.tags)


def test_an_invalid_event_does_not_stop_the_others(spool: Spool, uri: str) -> None:
    run = spool.record("run")
    run.start("run")
    run.metrics({"loss": 3.0, "a/../b": 1.0}, 1)  # MLflow refuses this name
    run.artifact(f"{spool.folder}/never-written")
    run.metrics({"loss": 2.0}, 2)
    assert flush(spool, uri).refused() == 2
    assert points(uri, runs(uri)["run"], "loss") == [(1, 3.0), (2, 2.0)]


def test_a_spool_uploads_nothing_from_outside_the_runs_folder_and_only_its_owner_reads_it(
    spool: Spool, uri: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Others may write to a spool on a shared disk, and MLflow's artifacts are read by all."""
    from mlflow import MlflowClient

    secret = tmp_path_factory.mktemp("home") / "id_rsa"
    secret.write_text("private")
    (tmp_path / "link.txt").symlink_to(secret)
    (tmp_path / "report.html").write_text("report")
    run = spool.record("run")
    run.start("run")
    for path, folder in ((secret, ""), (tmp_path / "link.txt", ""), (tmp_path / "report.html", "../../outside")):
        run.artifact(str(path), folder)
    run.artifact(str(tmp_path / "report.html"))
    flusher = flush(spool, uri)
    assert flusher.refused() == 3
    uploaded = MlflowClient(uri).list_artifacts(flusher.run_ids()["run"])
    assert [file.path for file in uploaded] == ["report.html"]
    private = [*Path(spool.folder).iterdir(), Path(uri.removeprefix("sqlite:///"))]
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
    assert Path(spool.folder).stat().st_mode & 0o777 == 0o700


def test_a_run_that_was_deleted_in_mlflow_stays_deleted_until_it_starts_again(spool: Spool, uri: str) -> None:
    from mlflow import MlflowClient

    run = spool.record("run")
    run.start("run")
    first = Flusher(spool, uri, EXPERIMENT, interval=0.1)
    deleted = first.wait_for("run", 60)
    MlflowClient(uri).delete_run(deleted)
    run.metrics({"loss": 2.0}, 1)
    assert first.close() == 0
    assert first.refused() == 1
    run.start("run")
    run.metrics({"loss": 1.0}, 2)
    assert flush(spool, uri).run_ids()["run"] != deleted
    assert points(uri, runs(uri)["run"], "loss") == [(2, 1.0)]


def test_a_deleted_database_is_filled_again(spool: Spool, uri: str, empty_database: Path) -> None:
    run = spool.record("run")
    run.start("run")
    run.metrics({"loss": 1.0}, 1)
    flush(spool, uri)
    file = Path(uri.removeprefix("sqlite:///"))
    file.unlink()
    shutil.copy(empty_database, file)
    flush(spool, uri)
    assert points(uri, runs(uri)["run"], "loss") == [(1, 1.0)]


def test_two_drivers_create_one_database(spool: Spool, new_uri: str) -> None:
    code = """
import sys
from minitron_platform.tracking.flusher import Flusher
from minitron_platform.tracking.spool import Spool
spool = Spool(sys.argv[1])
spool.record(sys.argv[3]).start("run")
print(Flusher(spool, sys.argv[2], "tiny family").close(60))
"""
    drivers = [
        subprocess.Popen([sys.executable, "-c", code, f"{spool.folder}-{n}", new_uri, f"run-{n}"], env=environment())
        for n in range(2)
    ]
    for driver in drivers:
        driver.communicate(timeout=120)
        assert driver.returncode == 0
    assert sorted(runs(new_uri)) == ["run-0", "run-1"]


def test_a_driver_whose_run_was_taken_over_sends_nothing_that_the_other_records_too(spool: Spool, uri: str) -> None:
    first = spool.record("run")
    first.start("run")
    with Flusher(spool, uri, EXPERIMENT, interval=0.05) as flusher:
        for step in range(100):
            first.metrics({"loss": 1.0}, step)
        assert flusher.wait_for("run", 60)
        other = Spool(spool.folder)
        second = other.record("run")
        with Flusher(other, uri, EXPERIMENT, interval=0.05):
            for step in range(100, 200):
                second.metrics({"loss": 2.0}, step)
                first.metrics({"loss": 1.0}, step)  # it has not noticed yet
            spool.flush()
            assert spool.fenced
        second.end()
        other.close()
    last = Spool(spool.folder)
    flush(last, uri)
    expected = [(step, 1.0 if step < 100 else 2.0) for step in range(200)]
    assert points(uri, runs(uri)["run"], "loss") == expected
    assert last.status("run") == "FINISHED"


def test_a_spool_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "spool").write_text("a file where the folder should be")
    spool = Spool(str(tmp_path / "spool"))
    run = spool.record("run")
    run.start("run")
    run.metrics({"loss": 1.0}, 1)
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1
    (tmp_path / "spool").unlink()
    flush(spool, uri)
    assert points(uri, runs(uri)["run"], "loss") == [(1, 1.0)]


def test_records_of_an_earlier_version_are_moved_into_the_spool(tmp_path: Path, uri: str) -> None:
    older = tmp_path / "home" / "spool"
    older.mkdir(parents=True)
    lines = [
        {"t": 1000, "event": "start", "name": "run", "parent": None, "tags": {}},
        {"t": 1001, "event": "metrics", "step": 1, "values": {"loss": 3.0, "grad_norm": "nan"}},
        {"t": 1002, "event": "metrics", "step": 2, "values": {"loss": 2.0}},
        {"t": 1003, "event": "metrics", "step": 2, "values": {"loss": 2.0}},  # it recorded some points twice
        {"t": 1004, "event": "end", "status": "FINISHED"},
    ]
    text = [json.dumps(line).encode() + b"\n" for line in lines]
    (older / "tiny-12345678.jsonl").write_bytes(b"".join(text))
    (older / ".sent.json").write_text(
        json.dumps({"store": ["x", "1", 2], "offsets": {"tiny-12345678": len(text[0])}, "runs": {}})
    )
    spool = Spool(str(tmp_path / "storage" / "spool"), older=str(older))
    assert list(older.iterdir()) == []
    assert spool.record("tiny-12345678").is_finished
    flush(spool, uri)
    flush(Spool(spool.folder, older=str(older)), uri)
    run = runs(uri)["tiny-12345678"]
    assert points(uri, run, "loss") == [(1, 3.0), (2, 2.0)]
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("FINISHED", 1000, 1004)


def test_unusable_settings_are_refused_immediately(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'a/b'"):
        RunLog(Spool(str(tmp_path)), "a/b")
    with pytest.raises(InputError, match="mlruns"):
        prepare_mlflow(str(tmp_path / "mlruns"))
    with pytest.raises(InputError, match="has no file name"):
        prepare_mlflow("sqlite:///:memory:")
    with pytest.raises(InputError) as refused:
        prepare_mlflow("oracle://user:hunter2@db/mlflow")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("address", ["oracle://user:hunter2@db/mlflow", "mysql+pymysql://user:hunter2@db/mlflow"])
def test_records_are_kept_if_the_address_is_wrong_or_its_driver_is_missing(
    spool: Spool, address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run with `tracking: best-effort` goes on with them."""
    monkeypatch.setitem(sys.modules, "pymysql", None)
    spool.record("run").start("run")
    with Flusher(spool, address, EXPERIMENT, interval=0.001) as flusher:
        assert flusher.wait_for("run", 0.1) is None
    said = " ".join(record.message for record in caplog.records)
    assert f"1 record is not in MLflow yet, but in {spool.folder}" in said
    assert "minitron sync" in said
    assert "hunter2" not in said


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
    spool = Spool(str(tmp_path / "spool"))
    with Flusher(spool, uri, "experiment") as flusher:
        spool.record("run").start("run")
        assert flusher.wait_for("run", timeout=60)
