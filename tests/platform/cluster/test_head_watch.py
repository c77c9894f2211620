"""A run whose cluster loses its head, for which a port stands that is closed. `benchmarks.kill_matrix` kills a real one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from minitron.errors import InputError
from minitron_platform.cluster import head_watch
from minitron_platform.cluster.head_watch import HeadLostError, HeadWatch
from minitron_platform.console import Console

PROGRAM = """
import sys, threading
from minitron_platform.cluster import head_watch
from minitron_platform.console import Console

head_watch.LOOK_SECONDS = 0.1
with head_watch.HeadWatch(Console("minitron run it.yaml"), lambda: print("records written")) as watch:
    watch.start(sys.argv[1])
    print("watching", flush=True)
    threading.Event().wait()
"""


@pytest.fixture
def head():
    """A port that answers until it is closed, and its address."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as server:
        yield server, f"127.0.0.1:{server.getsockname()[1]}"


def test_a_run_that_waits_for_a_lost_head_ends_with_an_error_that_says_how_to_go_on(head):
    server, address = head
    run = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, address],
        env=os.environ | {head_watch.RAY_SECONDS: "4"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with run:
        assert run.stdout.readline() == "watching\n"
        server.close()
        said, error = run.communicate(timeout=60)
    assert run.returncode == 2
    assert f"the cluster's head at {address} does not answer; the run ends if it does not come back within" in said
    assert said.endswith("records written\n")
    assert error.startswith(f"error: the head of the Ray cluster, at {address}, is lost")
    assert "What is finished is in the storage" in error
    assert error.endswith("otherwise the same command: minitron run it.yaml\n")


def fail(address, error):
    """A run at a head that ends with `error`."""
    with HeadWatch(Console(), print) as watch:
        watch.start(address)
        raise error


def test_what_a_lost_head_makes_fail_is_an_error_about_the_head(head):
    server, address = head
    error = InputError("the workers have ended without a reason", "")
    with pytest.raises(InputError):
        fail(address, error)
    server.close()
    with pytest.raises(HeadLostError, match=address) as lost:
        fail(address, error)
    assert "otherwise the same recipe and settings" in lost.value.remedy
    with pytest.raises(KeyboardInterrupt):
        fail(address, KeyboardInterrupt())
