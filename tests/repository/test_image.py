"""The versions that the files in clusters/ name agree with constraints.txt, and the image is pinned, small and without root."""

from __future__ import annotations

import re
import tomllib

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


def _instructions():
    """(name, argument) of each instruction of the Dockerfile, its lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "clusters/docker/Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", "").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def test_the_image_has_the_cuda_of_the_locked_torch():
    base = dict(_instructions())["ARG"].removeprefix("BASE=")
    release = _pin("torch").rpartition(".")[0]
    assert re.fullmatch(rf"nvidia/cuda:{CUDA_OF_TORCH[release]}\.\d+-base-ubuntu\d\d\.04", base)


def test_the_image_installs_locked_versions_alone_and_runs_without_root():
    instructions = _instructions()
    assert {argument.split()[0] for name, argument in instructions if name == "FROM"} == {"${BASE}"}
    assert [argument for name, argument in instructions if name == "USER"] == ["1000:1000"]
    assert "ADD" not in dict(instructions)
    runs = [argument for name, argument in instructions if name == "RUN"]
    for command in (part for run in runs for part in run.split("&&")):
        if "pip install" in command:
            assert "--no-cache-dir -c constraints.txt" in command
        if "apt-get install" in command:
            assert "--no-install-recommends" in command
    assert all("rm -rf /var/lib/apt/lists/*" in run for run in runs if "apt-get" in run)


def test_the_image_gets_what_the_wheel_is_built_from_and_nothing_else():
    copied = {
        source
        for name, argument in _instructions()
        if name == "COPY" and not argument.startswith("--from")
        for source in argument.split()[:-1]
    }
    ignored = (ROOT / "clusters/docker/Dockerfile.dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [
        *wheel["packages"],
        *wheel["force-include"],
        project["project"]["readme"],
        *project["project"]["license-files"],
    ]
    assert [path for path in needed if path.split("/")[0] not in copied] == []
