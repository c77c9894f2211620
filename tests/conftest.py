"""Fixtures that several test files use."""

from __future__ import annotations

import os

import pytest

from minitron.garbage import collector_off

os.environ.update(
    MLFLOW_DISABLE_TELEMETRY="true",
    RAY_USAGE_STATS_ENABLED="0",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # more threads do not help tiny models and slow down processes that share the cores
    OMP_WAIT_POLICY="passive",  # threads of a trial that wait for each other leave the cores to the other processes
    RAY_worker_niceness="0",  # by default Ray's workers hardly compute while other tests do
)


def pytest_make_parametrize_id(val, argname):
    """Bytes are not part of a test's name: those of a packed file hold the time, and each pytest worker has its own."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """The test files import torch, transformers and Ray."""
    with collector_off():
        return (yield)


@pytest.fixture
def free_port():
    """A function that returns a free port of the loopback address."""
    from helpers.mlflow_server import free_port

    return free_port


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id):
    """A folder of all processes of this test run, see `helpers.sharing`."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """A folder with a small trained teacher, a text, a benchmark, and the recipe that uses them."""
    from helpers import tiny

    return tiny.bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def finished(shared):
    """A run of the recipe of `bench` that the command has finished. All test processes read it: see `copied` to change it."""
    from helpers.finished_run import FinishedRun, run_recipe
    from helpers.sharing import made_once

    return FinishedRun(made_once(shared / "finished", run_recipe))


@pytest.fixture(scope="module")
def copied(finished, tmp_path_factory):
    """A folder with the recipe and a copy of the storage of `finished`, which is called `runs`."""
    return finished.copy(tmp_path_factory.mktemp("copied"))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a trained teacher, its rows, its stored hidden states and its scores."""
    from helpers import distilling

    return distilling.make_material(tmp_path_factory.mktemp("distill"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Inputs of a search: distillation inputs with a trained teacher, the source that students are pruned from, and six
    candidates."""
    from helpers import searching

    return searching.make_inputs(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def ray_here():
    """A private Ray with two CPUs that the runs of this process share, where each would start its own."""
    from minitron_platform.cluster.ray_session import ray_session

    with ray_session(None, num_cpus=2, seats=2):
        yield


@pytest.fixture(scope="session")
def empty_database(shared):
    """A database with MLflow's tables, to be copied: creating them takes seconds."""
    from helpers.sharing import made_once

    from minitron_platform.tracking.flusher import create_database

    folder = made_once(shared / "database", lambda folder: create_database(f"sqlite:///{folder}/mlflow.db"))
    return folder / "mlflow.db"
