"""Records and promotions on an MLflow server with PostgreSQL and a password, started by the documented command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from click.testing import CliRunner
from helpers.postgres_server import PostgresServer, postgres_server, refusal
from mlflow import MlflowClient

from minitron.errors import InputError, StorageError
from minitron.storage import committed_folder, manifest, verify
from minitron_platform.cli.commands import main
from minitron_platform.tracking.alias_lock import LOCK_PREFIX
from minitron_platform.tracking.flusher import Flusher
from minitron_platform.tracking.logged_models import ModelFigures
from minitron_platform.tracking.moves import promote
from minitron_platform.tracking.registry import models, register
from minitron_platform.tracking.spool import Spool

NAME = "tiny-family"
POINTS = 3_000  # more than two of MLflow's largest batches


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", running.password)
        yield running


@pytest.fixture(scope="module")
def run_id(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a run that is recorded on the server."""
    spool = Spool(str(tmp_path_factory.mktemp("spool")))
    record = spool.record("run")
    record.start("distill", tags={"long": "é" * 6000})
    for step in range(1, POINTS + 1):
        record.metrics({"kl": 1 / step}, step)
    record.end()
    flusher = Flusher(spool, server.address, "tiny family", interval=0.2)
    assert flusher.close() == 0
    spool.close()
    return flusher.run_ids()["run"]


def command(server: PostgresServer, *arguments: str) -> str:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(main, [*arguments, "--tracking-uri", server.address])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_second_server_in_the_same_folder_is_refused(server: PostgresServer) -> None:
    said = refusal(server.folder, home=server.folder.parent)
    assert said.startswith(f"serve.sh: PostgreSQL runs in {server.folder} already: end the serve.sh that started it")
    assert requests.get(f"{server.address}/health", timeout=30).ok


def test_nobody_reads_the_server_without_the_password(server: PostgresServer) -> None:
    for path in ("/", "/api/2.0/mlflow/registered-models/search", "/api/2.0/mlflow-artifacts/artifacts"):
        for guess in (None, ("admin", "password"), ("admin", "")):
            assert requests.get(server.address + path, auth=guess).status_code == 401, path
    assert server.folder.stat().st_mode & 0o077 == 0


def test_every_point_of_a_run_arrives_once_and_in_order(server: PostgresServer, run_id: str) -> None:
    client = MlflowClient(server.address)
    assert client.get_run(run_id).info.status == "FINISHED"
    history = client.get_metric_history(run_id, "kl")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in range(1, POINTS + 1)]


ATTEMPTS = 8  # processes, and promotions of each
PROMOTER = """import sys
from minitron.errors import InputError
from minitron_platform.tracking.moves import promote

address, name, version, attempts = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
for attempt in range(int(attempts)):
    try:
        promote(address, name, version=version, tags={f"attempt.{attempt}": "promoted"})
        print("promoted", flush=True)
    except InputError as error:
        print(error.problem, flush=True)
"""


@pytest.mark.long
def test_of_promotions_by_many_processes_one_wins_each_time_and_the_history_is_one_chain(
    server: PostgresServer, tmp_path: Path
) -> None:
    name = "tiny-contested"
    for number in range(ATTEMPTS):
        with committed_folder(str(tmp_path / str(number))) as folder:
            (folder / "model.safetensors").write_text(str(number) * 10)
        register(server.address, name=name, source=str(tmp_path / str(number)), run_id=None, tags={})
    arguments = [sys.executable, "-c", PROMOTER, server.address, name]
    processes = [
        subprocess.Popen(
            [*arguments, str(version + 1), str(ATTEMPTS)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for version in range(ATTEMPTS)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        with ThreadPoolExecutor(ATTEMPTS) as pool:
            outputs = list(pool.map(lambda process: process.communicate("\n", timeout=300)[0], processes))
    finally:
        for process in processes:
            process.kill()
    said = [line for output in outputs for line in output.splitlines()]
    assert len(said) == ATTEMPTS**2
    losers = [line for line in said if line != "promoted"]
    assert losers
    assert all("champion was moved to version" in line for line in losers)
    client = MlflowClient(server.address)
    model = client.get_registered_model(name)
    moves = json.loads(model.tags["minitron.history.champion"])
    chain = [None, *(move["version"] for move in moves)]
    assert [move["previous"] for move in moves] == chain[:-1]
    assert chain[-1] == str(model.aliases["champion"])
    versions = client.search_model_versions(f"name='{name}'")
    marked = sum(tag.startswith("attempt.") for version in versions for tag in version.tags)
    assert marked == len(said) - len(losers) >= len(moves) >= 2
    assert not [m.name for m in client.search_registered_models() if m.name.startswith(LOCK_PREFIX)]


def test_versions_are_registered_promoted_rolled_back_and_pulled(
    server: PostgresServer, run_id: str, tmp_path: Path
) -> None:
    for number in "123":
        with committed_folder(str(tmp_path / number)) as folder:
            (folder / "model.safetensors").write_text(number * 1000)
        figures = ModelFigures(run_id, {"kl": int(number) / 10}, {"teacher": "large"})
        register(server.address, name=NAME, source=str(tmp_path / number), run_id=run_id, tags={}, figures=figures)
    assert promote(server.address, NAME, version="1").previous is None

    def attempt(version: str) -> str:
        try:
            return promote(server.address, NAME, version=version, since=("1",)).version
        except InputError as error:
            return error.problem

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(attempt, "23"))
    (winner,) = set(said) & {"2", "3"}
    (told,) = set(said) - {winner}
    assert f"champion was moved to version {winner} meanwhile, it was at version 1" in told
    assert f"{NAME}@champion is version 1 (was version {winner})" in command(server, "rollback", NAME)
    history = json.loads(MlflowClient(server.address).get_registered_model(NAME).tags["minitron.history.champion"])
    assert [(move["previous"], move["version"]) for move in history] == [(None, "1"), ("1", winner), (winner, "1")]
    assert {row.version: row.aliases for row in models(server.address)} == {
        "3": ("candidate",),
        "2": (),
        "1": ("champion",),
    }
    assert "version 1, verified" in command(server, "models", "pull", f"{NAME}@champion", str(tmp_path / "pulled"))
    verify(str(tmp_path / "pulled"))
    assert manifest(str(tmp_path / "pulled"))["files"] == manifest(str(tmp_path / "1"))["files"]
    (stored,) = [file for file in server.folder.rglob("model.safetensors") if file.read_text().startswith(winner)]
    stored.write_text(winner * 999 + "x")
    with pytest.raises(StorageError, match="SHA-256 is"):
        promote(server.address, NAME, version=winner)
