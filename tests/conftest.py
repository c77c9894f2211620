"""Fixtures that several test files use."""

from __future__ import annotations

import os
import socket

import pytest

os.environ.update(
    MLFLOW_DISABLE_TELEMETRY="true",
    RAY_USAGE_STATS_ENABLED="0",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # tiny models gain nothing from more, and lose a lot where processes share the cores
)


@pytest.fixture
def free_port():
    """A function that gives a loopback port nobody listens on."""

    def find() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """A folder with a small trained teacher, a text, a benchmark, and the recipe that uses them."""
    from helpers import tiny

    return tiny.bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a trained teacher, its rows, its stored hidden states and its scores."""
    from helpers import distilling

    return distilling.make_material(tmp_path_factory.mktemp("distill"))


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """MLflow takes seconds to make its tables; once is enough. Copy it."""
    from minitron_platform.tracking.flusher import create_database

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    create_database(f"sqlite:///{file}")
    return file
