"""A private Ray: what is refused before it starts, what it has, and its end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from helpers.command import environment
from ray import cloudpickle
from ray.train import RunConfig, ScalingConfig

from minitron.errors import InputError, MinitronError
from minitron_platform.cluster.nodes_at import nodes_at
from minitron_platform.cluster.ray_session import IN_A_JOB, METRICS_PORT, _private_settings, ray_session
from minitron_search.torch_trainer import TorchTrainer
from minitron_search.train_files import storage_settings


@pytest.mark.parametrize("port", ["80", "70000", "metrics", "-1"])
def test_a_metrics_port_that_is_not_allowed_is_refused(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(METRICS_PORT, port)
    with pytest.raises(InputError, match=f"{METRICS_PORT}='{port}'"), ray_session("local"):
        pass


def test_a_metrics_port_in_use_is_refused_before_ray_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv(METRICS_PORT, str(port))
        with pytest.raises(InputError, match=f"{METRICS_PORT}={port}: Address already in use"), ray_session("local"):
            pass


def test_a_private_ray_in_a_job_has_the_runtime_environment_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IN_A_JOB, json.dumps({"runtime_env": {"env_vars": {"OF_THE_JOB": "7"}}}))
    with ray_session("local", num_cpus=1):
        assert ray.get(ray.remote(lambda: os.environ["OF_THE_JOB"]).remote()) == "7"


HOOKED = """
import ray, sys
from minitron_platform.cluster.ray_session import ray_session

def add(runtime_env):
    return {"env_vars": {"OF_THE_HOOK": "7"}}

if __name__ == "__main__":
    with ray_session("local", num_cpus=1):
        print(dict(ray.get_runtime_context().runtime_env), ray.get(ray.remote(lambda: sys.executable).remote()))
"""


UV = Path(sys.executable).with_name("uv")


@pytest.mark.parametrize("started_with", [(UV, "run", "--no-project", "--python", sys.executable), ()])
def test_the_workers_of_a_private_ray_have_the_drivers_python_whatever_ray_would_add(
    started_with: tuple[str | Path, ...], tmp_path: Path
) -> None:
    """By itself Ray starts workers with `uv run` where the driver is, and with what a hook of the administrator's adds. No
    program is looked for in PATH, not even a shell."""
    (tmp_path / "hooked.py").write_text(HOOKED)
    command = [*started_with, sys.executable, tmp_path / "hooked.py"]
    variables = environment() | {"RAY_RUNTIME_ENV_HOOK": "hooked.add"}
    variables["PYTHONPATH"] = os.pathsep.join([variables["PYTHONPATH"], str(tmp_path)])
    variables["PATH"] = str(tmp_path)
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{{}} {sys.executable}\n", done.stderr


def test_nobody_joins_the_private_ray_of_a_run(ray_here: None) -> None:
    with pytest.raises(MinitronError, match="is the private one of a run on this machine, and ends with it"):
        nodes_at(ray.get_runtime_context().gcs_address)


COLLECTING = """
import gc, threading, time, ray
from minitron_platform.cluster.ray_session import ray_session
def collect():
    while ray.is_initialized(): time.sleep(0)
    gc.collect()
with ray_session(None, num_cpus=1):
    gc.disable()
    number = ray.put(0).binary()
    cycle = [ray.ObjectRef(number) for _ in range(100_000)]
    cycle.append(cycle)
    del cycle
    threading.Thread(target=collect).start()
print("ended")
"""


OF_RAY_TRAIN = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}


def _tell(config: dict[str, str]) -> None:
    found = {"runtime_env": dict(ray.get_runtime_context().runtime_env)}
    Path(config["file"]).write_text(json.dumps(found | {name: os.environ.get(name) for name in OF_RAY_TRAIN}))


def test_ray_train_on_a_private_ray_needs_no_runtime_environment_to_have_the_drivers_variables(
    ray_here: None, tmp_path: Path
) -> None:
    """Ray starts a process with a runtime environment twice: the first one only prepares the second."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    TorchTrainer(
        _tell,
        train_loop_config={"file": str(tmp_path / "told")},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="tell", **storage_settings(str(tmp_path / "ray"))),
    ).fit()
    assert json.loads((tmp_path / "told").read_text()) == {"runtime_env": {}, **OF_RAY_TRAIN}


def test_a_thread_that_collects_garbage_while_ray_is_shut_down_does_not_end_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COLLECTING], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr


def test_a_token_that_another_program_writes_later_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray keeps the first token of a process."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    # afterwards this process goes on with the token that Ray has, which may be that of the home folder
    monkeypatch.setattr("minitron_platform.cluster.ray_session._local_token", "")
    token = _private_settings()["RAY_AUTH_TOKEN"]
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("x" * 64)
    assert _private_settings()["RAY_AUTH_TOKEN"] == token
