"""Clusters that are joined, whose head listens on the loopback interface alone."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from helpers.command import environment
from helpers.serving import serving
from ray.experimental import internal_kv

from minitron.errors import MinitronError
from minitron_platform.cluster.nodes_at import nodes_at
from minitron_platform.cluster.ray_session import _at_loopback, _private_settings, private_folder
from minitron_platform.cluster.tokens import auth_token

JOINING = """
import sys, ray
from minitron_platform.cluster.ray_session import ray_session
with ray_session(sys.argv[1]):
    print(ray.get(ray.remote(num_cpus=0)(lambda: 3).remote()))
"""


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of a cluster's head that listens on the loopback interface alone, with two CPUs."""
    with pytest.MonkeyPatch.context() as patch, private_folder() as folder:
        for name, value in _private_settings().items():
            patch.setenv(name, value)
        with _at_loopback():
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


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


def test_a_head_that_listens_on_the_loopback_interface_alone_is_seen_and_joined(head: str) -> None:
    assert head.startswith("127.0.0.1:")
    seen = nodes_at(head)
    assert seen is not None
    assert seen.present[0]["CPU"] == 2
    done = join(head, own_token())
    assert done.stdout.strip() == "3", done.stderr


@pytest.mark.parametrize(("token", "reason"), [("0" * 64, "refused the token"), ("", "requires a token")])
def test_a_head_that_wants_another_token_is_one_error_at_once(
    token: str, reason: str, head: str, tmp_path: Path
) -> None:
    """Ray would try again for 15 s, with a line of its log each time, and end with "failed to connect"."""
    done = join(head, token, HOME=str(tmp_path))
    assert done.stderr.splitlines()[-2].startswith(f"minitron.errors.MinitronError: Ray at '{head}': the head {reason}")
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


def test_a_cluster_with_another_python_is_named_with_both_versions(head: str) -> None:
    key = {"key": b"CLUSTER_METADATA", "namespace": b"cluster"}
    before = internal_kv._internal_kv_get(**key)
    other = before.replace(platform.python_version().encode(), b"3.11.99")
    internal_kv._internal_kv_put(**key, value=other, overwrite=True)
    try:
        done = join(head, own_token())
    finally:
        internal_kv._internal_kv_put(**key, value=before, overwrite=True)
    error = done.stderr.splitlines()[-2]
    assert "Python: 3.11.99" in error
    assert f"Python: {platform.python_version()}" in error
