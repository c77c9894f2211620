"""The versions that the files in clusters/ name agree with constraints.txt."""

from __future__ import annotations

import re

import yaml
from helpers.command import ROOT, minitron_here

CUDA_OF_TORCH = {"2.13": "13.0"}  # of the build of torch at PyPI, which says so in its requirements


def _pin(package):
    (pin,) = re.findall(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return pin


def test_rendered_files_name_the_version_of_ray_that_is_locked(tmp_path):
    done = minitron_here(
        *("cluster", "render", "kuberay", "--nodes", "1", "--gpus", "8", "--image", "minitron:1"), cwd=tmp_path
    )
    (cluster,) = (manifest for manifest in yaml.safe_load_all(done.stdout) if manifest["kind"] == "RayCluster")
    assert cluster["spec"]["rayVersion"] == _pin("ray")
