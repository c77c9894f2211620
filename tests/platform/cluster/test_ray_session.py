"""What a private Ray is refused before it starts, and heads that listen on the loopback interface alone."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from helpers.command import environment

from minitron.errors import InputError
from minitron_platform.cluster.nodes_at import nodes_at
from minitron_platform.cluster.ray_session import METRICS_PORT, _private_settings, ray_session


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


JOINING = """
import sys, ray
from minitron_platform.cluster.ray_session import ray_session
with ray_session(sys.argv[1]):
    print(ray.get(ray.remote(num_cpus=0)(lambda: 3).remote()))
"""


def test_a_head_that_listens_on_the_loopback_interface_alone_is_seen_and_joined(ray_here: None) -> None:
    address = ray.get_runtime_context().gcs_address
    assert address.startswith("127.0.0.1:")
    seen = nodes_at(address)
    assert seen is not None
    assert seen.present[0]["CPU"] == 2
    token = {name: value for name, value in _private_settings().items() if name == "RAY_AUTH_TOKEN"}
    done = subprocess.run(
        [sys.executable, "-c", JOINING, address], env=environment() | token, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "3", done.stderr


def test_a_token_that_another_program_writes_later_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray keeps the first token of a process."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    token = _private_settings()["RAY_AUTH_TOKEN"]
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("x" * 64)
    assert _private_settings()["RAY_AUTH_TOKEN"] == token
