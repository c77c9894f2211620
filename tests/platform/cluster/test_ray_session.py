"""What a private Ray is refused before it starts, and heads that listen on the loopback interface alone."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from helpers.command import environment
from helpers.serving import serving
from ray import cloudpickle
from ray.experimental import internal_kv
from ray.train import RunConfig, ScalingConfig

from minitron.errors import InputError, MinitronError
from minitron_platform.cluster.nodes_at import nodes_at
from minitron_platform.cluster.ray_session import METRICS_PORT, _private_settings, ray_session
from minitron_platform.cluster.tokens import auth_token
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


JOINING = """
import sys, ray
from minitron_platform.cluster.ray_session import ray_session
with ray_session(sys.argv[1]):
    print(ray.get(ray.remote(num_cpus=0)(lambda: 3).remote()))
"""


def own_token() -> str:
    """The token of this process's private Ray."""
    return _private_settings().get("RAY_AUTH_TOKEN") or auth_token() or ""


def join(address: str, token: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Join the cluster in a process of its own."""
    environ = {name: value for name, value in environment().items() if not name.startswith("RAY_AUTH")}
    environ |= {"RAY_AUTH_TOKEN": token, **variables} if token else variables
    return subprocess.run(
        [sys.executable, "-c", JOINING, address], env=environ, capture_output=True, text=True, timeout=120
    )


def test_a_head_that_listens_on_the_loopback_interface_alone_is_seen_and_joined(ray_here: None) -> None:
    address = ray.get_runtime_context().gcs_address
    assert address.startswith("127.0.0.1:")
    seen = nodes_at(address)
    assert seen is not None
    assert seen.present[0]["CPU"] == 2
    done = join(address, own_token())
    assert done.stdout.strip() == "3", done.stderr


@pytest.mark.parametrize(("token", "reason"), [("0" * 64, "refused the token"), ("", "requires a token")])
def test_a_head_that_wants_another_token_is_one_error_at_once(
    token: str, reason: str, ray_here: None, tmp_path: Path
) -> None:
    """Ray would try again for 15 s, with a line of its log each time, and end with "failed to connect"."""
    address = ray.get_runtime_context().gcs_address
    done = join(address, token, HOME=str(tmp_path))
    assert done.stderr.splitlines()[-2].startswith(
        f"minitron.errors.MinitronError: Ray at '{address}': the head {reason}"
    )
    assert "gcs_client.cc" not in done.stderr


def test_another_program_in_place_of_the_head_is_named_at_once() -> None:
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)) as server:
        address = f"127.0.0.1:{server.server_port}"
        with pytest.raises(MinitronError, match="not the head of a Ray cluster") as refusal:
            nodes_at(address)
        done = join(address, own_token())
    assert address in refusal.value.problem
    assert "6379" in refusal.value.remedy
    assert str(refusal.value.problem) in done.stderr.splitlines()[-2]
    assert "gcs_client.cc" not in done.stderr


def test_a_cluster_with_another_python_is_named_with_both_versions(ray_here: None) -> None:
    key = {"key": b"CLUSTER_METADATA", "namespace": b"cluster"}
    before = internal_kv._internal_kv_get(**key)
    other = before.replace(platform.python_version().encode(), b"3.11.99")
    internal_kv._internal_kv_put(**key, value=other, overwrite=True)
    try:
        done = join(ray.get_runtime_context().gcs_address, own_token())
    finally:
        internal_kv._internal_kv_put(**key, value=before, overwrite=True)
    error = done.stderr.splitlines()[-2]
    assert "Python: 3.11.99" in error
    assert f"Python: {platform.python_version()}" in error


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
