"""Whatever an MLflow server does, every metric point of a run is in it once and in order in the end. Real server, real HTTP."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.command import environment
from helpers.faulty_proxy import FaultyProxy, faulty_proxy
from helpers.mlflow_server import free_port, mlflow_server

from minitron.errors import MinitronError
from minitron_platform.cli.commands import main
from minitron_platform.console import Console
from minitron_platform.leases import lease
from minitron_platform.locations import Locations
from minitron_platform.sync import sync
from minitron_platform.tracking.flusher import Flusher
from minitron_platform.tracking.spool import Spool

POINTS = 200
CHILDREN = 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[FaultyProxy]:
    """A proxy in front of an MLflow server; each test has an experiment of its own."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder)
    port = free_port()
    with mlflow_server(folder, port), faulty_proxy(port) as proxy:
        yield proxy


@pytest.fixture
def proxy(server: FaultyProxy) -> FaultyProxy:
    server.set(["pass"])
    return server


def record(spool: Spool, key: str) -> None:
    """A run with a stage per child, each with POINTS points of two metrics."""
    run = spool.record(key)
    run.start(key)
    for child in range(CHILDREN):
        stage = spool.record(f"{key}.{child}")
        stage.start(f"stage {child}", parent=key)
        stage.params({"seed": child})
        for step in range(POINTS):
            stage.metrics({"loss": step + child / 10, "tokens": step * 7}, step)
        stage.end("FAILED" if child == 1 else "FINISHED")
    run.end()


def check(proxy: FaultyProxy, experiment: str, key: str) -> None:
    """Fail unless everything that `record` has recorded is in MLflow once, in order."""
    from mlflow import MlflowClient

    proxy.set(["pass"])
    client = MlflowClient(proxy.address)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    by_key = {run.data.tags["minitron.key"]: run for run in runs}
    assert len(runs) == len(by_key) == CHILDREN + 1
    for child in range(CHILDREN):
        run: Any = by_key[f"{key}.{child}"]
        losses = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")]
        assert losses == [(step, step + child / 10) for step in range(POINTS)]
        assert len(client.get_metric_history(run.info.run_id, "tokens")) == POINTS
        assert run.data.params == {"seed": str(child)}
        assert run.data.tags["mlflow.parentRunId"] == by_key[key].info.run_id
    found = {name: run.info.status for name, run in by_key.items()}
    assert found == {key: "FINISHED", **{f"{key}.{c}": "FAILED" if c == 1 else "FINISHED" for c in range(CHILDREN)}}


@pytest.mark.parametrize("seed", range(2))
def test_every_point_arrives_once_through_faults(proxy: FaultyProxy, tmp_path: Path, seed: int) -> None:
    experiment, key = f"faults-{seed}", "tiny-1"
    faults = random.Random(seed).choices(["pass", "lost", "away", "500", "429", "404"], [10, 2, 1, 1, 1, 1], k=1000)
    proxy.set(faults, delay=0.01)  # type: ignore[arg-type]
    spool = Spool(str(tmp_path / "runs" / key / "spool"))
    flusher = Flusher(spool, proxy.address, experiment, interval=0.005)
    began = time.monotonic()
    record(spool, key)
    assert time.monotonic() - began < 20  # recording waits for nothing
    assert flusher.close() == 0
    assert flusher.refused() == 0
    check(proxy, experiment, key)


def test_a_server_that_restarts_delays_nothing_and_loses_nothing(
    proxy: FaultyProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(str(tmp_path / "runs" / "tiny-1" / "spool"))
    with Flusher(spool, proxy.address, "restart", interval=0.05) as flusher:
        spool.record("tiny-1").start("tiny-1")
        assert flusher.wait_for("tiny-1", 30)
        proxy.set(["away"])
        record(spool, "tiny-1")
        assert flusher.wait_for("tiny-1.0", 0.3) is None
        proxy.set(["pass"])
        assert flusher.wait_for("tiny-1.0", 30)
    check(proxy, "restart", "tiny-1")
    said = [record.message for record in caplog.records if record.name == "minitron_platform.tracking.flusher"]
    assert len(said) == 2, said
    assert "records are kept in" in said[0]
    assert "answers again" in said[1]


@pytest.mark.long
def test_a_server_that_is_stopped_in_the_middle_and_started_again_has_every_point_once(
    tmp_path: Path, empty_database: Path
) -> None:
    shutil.copy(empty_database, tmp_path)
    port = free_port()
    spool = Spool(str(tmp_path / "runs" / "tiny-1" / "spool"))
    flusher = Flusher(spool, f"http://127.0.0.1:{port}", "stopped", interval=0.05)
    with mlflow_server(tmp_path, port):
        spool.record("tiny-1").start("tiny-1")
        assert flusher.wait_for("tiny-1", 60)
        recording = threading.Thread(target=record, args=(spool, "tiny-1"))
        recording.start()
    recording.join()
    assert flusher.wait_for("tiny-1.3", 0.3) is None
    with mlflow_server(tmp_path, port), faulty_proxy(port) as passing:
        assert flusher.close() == 0
        check(passing, "stopped", "tiny-1")


def test_closing_waits_as_long_as_a_slow_server_takes_records(
    proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron_platform.tracking.sender.AT_ONCE", 1)  # so that it takes longer
    spool = Spool(str(tmp_path / "runs" / "tiny-1" / "spool"))
    flusher = Flusher(spool, proxy.address, "slow", interval=0.05)
    spool.record("tiny-1").start("tiny-1")
    assert flusher.wait_for("tiny-1", 30)
    proxy.set(["pass"], delay=0.15)
    record(spool, "tiny-1")
    began = time.monotonic()
    assert flusher.close(patience=1.5) == 0
    assert time.monotonic() - began > 1.6
    check(proxy, "slow", "tiny-1")


def test_what_a_server_that_was_away_from_start_to_end_lacks_is_sent_by_sync(
    proxy: FaultyProxy, tmp_path: Path
) -> None:
    locations = Locations(str(tmp_path), str(tmp_path), proxy.address)
    proxy.set(["away"])
    spool = Spool(locations.spool("tiny-1"), experiment="away")
    with Flusher(spool, proxy.address, "away", interval=0.01) as flusher:
        record(spool, "tiny-1")
        began = time.monotonic()
    assert time.monotonic() - began < 10
    assert flusher.sent() == 0
    spool.close()
    with pytest.raises(MinitronError, match="does not answer"):
        sync(locations, Console())
    proxy.set(["pass"])
    command = ["sync", "--storage", str(tmp_path), "--tracking-uri", proxy.address]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert f"{CHILDREN * (POINTS + 3) + 2:,} records sent" in done.output
    check(proxy, "away", "tiny-1")
    assert "nothing to send" in CliRunner().invoke(main, command).output


def test_sync_leaves_a_live_run_alone_and_ends_one_that_was_killed(
    proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    locations = Locations(str(tmp_path), str(tmp_path), proxy.address)
    spool = Spool(locations.spool("tiny-1"), experiment="killed")
    spool.record("tiny-1").start("tiny-1")
    spool.record("tiny-1.search").start("search", parent="tiny-1")
    spool.flush()  # and then the driver is killed
    (tmp_path / "runs" / "comparison.html").touch()  # of `minitron report` for two runs
    monkeypatch.setenv("MINITRON_LEASE_SECONDS", "1")  # a heartbeat every 0.25 s
    with lease(locations, "run-tiny-1", "run tiny-1", run="tiny-1", console=Console()):
        assert sync(locations, Console()) == 0
    assert sync(locations, Console()) == 4
    client = MlflowClient(proxy.address)
    runs = client.search_runs([client.get_experiment_by_name("killed").experiment_id])
    assert [run.info.status for run in runs] == ["KILLED", "KILLED"]


DRIVER = """import sys
import mlflow
from minitron_platform.tracking.flusher import Flusher
from minitron_platform.tracking.spool import Spool

folder, address, own, begin, status = sys.argv[1:]
print("imported", flush=True)
sys.stdin.readline()
spool = Spool(folder)
with Flusher(spool, address, "two-drivers", interval=0.01) as flusher:
    run, stage = spool.record("run"), spool.record("run.distill")
    run.start("run")
    stage.start("distill", parent="run")
    for step in range(int(begin), int(begin) + 100):
        stage.metrics({"loss": step + float(own), "tokens": step * 7}, step)
    assert flusher.wait_for("run.distill", 60)
    print("recorded", flush=True)
    sys.stdin.readline()
    for step in range(100, 200):
        stage.metrics({"loss": step + float(own), "tokens": step * 7}, step)
    stage.end(status)
    run.end(status)
    spool.flush()
    print("fenced" if spool.fenced else "alone", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def driver(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process that records half of a run when it gets a line, the rest when it gets another one, and ends at a third one."""
    command = [sys.executable, "-c", DRIVER, *arguments]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert line_of(process) == "imported"
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_of_two_processes_that_record_one_run_the_later_one_does_and_every_point_is_there_once(
    proxy: FaultyProxy, tmp_path: Path
) -> None:
    """The first driver's machine sleeps, another driver takes its run over, and the first one wakes up and goes on."""
    from mlflow import MlflowClient

    faults = random.Random(0).choices(["pass", "lost", "500"], [8, 1, 1], k=1000)
    proxy.set(faults, delay=0.01)  # type: ignore[arg-type]
    folder = str(tmp_path / "runs" / "run" / "spool")
    first_arguments, second_arguments = ("0.0", "0", "FAILED"), ("0.5", "50", "FINISHED")
    with (
        driver(folder, proxy.address, *first_arguments) as first,
        driver(folder, proxy.address, *second_arguments) as second,
    ):
        go_on(first)
        assert line_of(first) == "recorded"
        first.send_signal(signal.SIGSTOP)
        go_on(second)
        assert line_of(second) == "recorded"
        first.send_signal(signal.SIGCONT)
        for process, said in ((first, "fenced"), (second, "alone")):
            go_on(process)
            assert line_of(process) == said
        for process in (first, second):
            go_on(process)
            assert process.wait(120) == 0
    proxy.set(["pass"])
    client = MlflowClient(proxy.address)
    runs = client.search_runs([client.get_experiment_by_name("two-drivers").experiment_id])
    assert {run.data.tags["minitron.key"]: run.info.status for run in runs} == {
        "run": "FINISHED",
        "run.distill": "FINISHED",
    }
    (stage,) = [run for run in runs if run.data.tags["minitron.key"] == "run.distill"]
    losses = [(point.step, point.value) for point in client.get_metric_history(stage.info.run_id, "loss")]
    assert losses == [(step, step + (0.0 if step < 100 else 0.5)) for step in range(200)]
    tokens = [point.step for point in client.get_metric_history(stage.info.run_id, "tokens")]
    assert tokens == list(range(200))
