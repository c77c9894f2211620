"""What a private Ray is refused before it starts."""

from __future__ import annotations

import socket

import pytest

from minitron.errors import InputError
from minitron_platform.cluster.ray_session import METRICS_PORT, ray_session


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
