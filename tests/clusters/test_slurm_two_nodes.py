"""A recipe on a real Slurm of two nodes, which benchmarks/slurm_two_nodes.sh starts on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny
from helpers.command import ROOT, environment, minitron_here


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_recipe_runs_on_both_nodes_of_a_slurm(tmp_path):
    missing = [program for program in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(program) is None]
    assert missing == [], "apt-get install slurm-wlm munge"
    assert os.geteuid() == 0, "Slurm's daemons need root"
    tiny.bench(tmp_path)
    recipe = ("--recipe", tmp_path / "recipe.yaml", "--storage", tmp_path / "runs", "--set", "resources.workers=2")
    nodes = ("--nodes", "2", "--gpus", "0", "--cpus", "2")
    made = minitron_here("cluster", "render", "slurm", *nodes, *recipe, "--out", ".", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    environ = environment() | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [ROOT / "benchmarks" / "slurm_two_nodes.sh", "sbatch", "--wait", "minitron.sbatch"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=800,
    )
    (log,) = tmp_path.glob("minitron-*.log")
    assert done.returncode == 0, done.stderr + log.read_text()[-3000:]
    assert "2 workers" in log.read_text()
    listed = minitron_here("models", "--storage", tmp_path / "runs", cwd=tmp_path)
    assert "tiny-student" in listed.stdout
