"""The script of `minitron cluster render slurm`, with a real Ray; srun and scontrol are stand-ins of a few lines."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from helpers.command import environment, minitron_here

STAND_INS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"',
    "scontrol": 'echo "scontrol $*" >> calls',
    # the run itself is a program of this test; the launcher is the real one
    "minitron": 'if [ "$1" = run ]; then exec "$PYTHON" run.py "$@"; fi\nexec "$PYTHON" -m minitron_platform "$@"',
}

# tells the script what Slurm would before a preemption, and ends when the launcher says so
RUN = """
import json, os, signal, sys
import ray
ray.init(logging_level="ERROR")
nodes = [[node["Resources"].get(key, 0) for key in ("CPU", "GPU")] for node in ray.nodes()]
print(json.dumps({"arguments": sys.argv[1:], "nodes": sorted(nodes)}), flush=True)
os.kill(int(os.environ["SCRIPT"]), signal.SIGUSR1)
signal.pause()
"""


@pytest.fixture
def job(tmp_path):
    """A rendered script of one node, and the environment that runs it here."""
    done = minitron_here(
        *("cluster", "render", "slurm", "--nodes", "1", "--gpus", "0", "--cpus", "2", "--recipe", "minimal"),
        *("--set", "description=a b", "--storage", "/shared/minitron", "--out", "."),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for name, text in STAND_INS.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    script = tmp_path / "minitron.sbatch"
    text = script.read_text()
    script.write_text(text.replace("set -u", "set -u\nexport SCRIPT=$$"))
    paths = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return script, {
        **environment(),
        "PATH": paths,
        "PYTHON": sys.executable,
        "JOB_FOLDER": str(tmp_path),
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "7",
    }


def _processes_of(folder):
    """Names of the living processes that the job in `folder` has started."""
    names = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("JOB_FOLDER") == str(folder):
                names.append(process.name())
    return names


@pytest.mark.long
def test_a_preempted_job_warns_ray_ends_its_own_ray_and_is_requeued(job, tmp_path):
    script, environ = job
    (tmp_path / "run.py").write_text(RUN)
    done = subprocess.run(["bash", script], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=500)
    assert done.returncode == 75, done.stderr
    assert json.loads(done.stdout) == {
        "arguments": ["run", "minimal", "--set", "description=a b"],
        "nodes": [[0, 0], [2, 0]],  # CPUs and GPUs of the head and of the worker
    }
    assert (tmp_path / "calls").read_text().splitlines() == ["scontrol requeue 7"]
    assert _processes_of(tmp_path) == []


def test_a_port_in_use_an_unknown_head_and_a_missing_token_are_refused_with_a_remedy(tmp_path, monkeypatch):
    def refusal(head, port):
        place = ("--nodes", "1", "--rank", "0", "--head", head, "--port", port)
        done = minitron_here("cluster", "launch", *place, "true", cwd=tmp_path)
        assert done.returncode == 2
        return done.stderr

    monkeypatch.setenv("RAY_AUTH_TOKEN", "test")
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert f"--port {port}: Address already in use\n  fix: give another port" in refusal("127.0.0.1", port)
    assert "--head x..y: " in refusal("x..y", port)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no token is set for Ray" in refusal("127.0.0.1", port)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--nodes", "4", "--rank", "4"), "--rank 4 of --nodes 4"),
        (("--nodes", "4", "--rank", "-1"), "-1 is not in the range"),
        (("--nodes", "0", "--rank", "0"), "0 is not in the range"),
        (("--nodes", "1", "--rank", "0", "--port", "70000"), "70000 is not in the range"),
        (("--nodes", "1", "--rank", "0", "--cpus", "-1"), "-1 is not in the range"),
        (("--nodes", "1", "--rank", "0", "--gpu", "1"), "No such option"),
        (
            ("--nodes", "1", "--rank", "0", "--port", "FREE", "no-such-program"),
            "no-such-program: there is no such program",
        ),
        (("--nodes", "1", "--rank", "1"), "--rank 1 of --nodes 1"),
    ],
)
def test_figures_that_no_job_has_are_refused_before_ray_starts(tmp_path, monkeypatch, options, problem):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "test")
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
    options = [port if option == "FREE" else option for option in options]
    done = minitron_here("cluster", "launch", "--head", "127.0.0.1", *options, "true", cwd=tmp_path)
    assert done.returncode == 2
    assert problem in done.stderr
