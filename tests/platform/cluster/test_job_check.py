"""What is compared between the packages of a cluster and those that Minitron needs. test_jobs.py asks a real head."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from minitron.errors import InputError
from minitron_platform.cluster import probe
from minitron_platform.cluster.brought import Brought
from minitron_platform.cluster.requirements import Environment, extras_for, lacks, pins, python_lack


@pytest.fixture(scope="module")
def here():
    """The environment of this machine, as the file that is sent to a cluster prints it."""
    printed = subprocess.run([sys.executable, "-I", probe.__file__], capture_output=True, text=True, check=True).stdout
    return Environment.read(json.loads(printed.removeprefix(probe.MARK)))


def without(environment, *names, **others):
    kept = {name: each for name, each in environment.packages.items() if name not in names}
    return replace(environment, packages={**kept, **others})


def test_this_machine_lacks_nothing(here):
    assert lacks(here, ["s3"]) == []
    assert python_lack(here) == ""


def test_a_package_that_is_missing_or_too_old_is_named_with_what_is_needed(here):
    there = without(here, "rich", "s3fs", transformers="4.57.0")
    said = [str(lack) for lack in lacks(there, ["s3"])]
    assert [text.split(",")[0] for text in said] == ["rich is missing", "transformers 4.57.0", "s3fs is missing"]
    assert all("is needed" in text for text in said)
    assert [str(lack).split()[0] for lack in lacks(there)] == ["rich", "transformers"]


def test_a_job_brings_what_is_missing_and_what_that_needs_in_the_versions_of_this_machine(here):
    there = without(here, "rich", "markdown-it-py")  # rich needs the other one
    assert pins(lacks(there), there) == [f"{name}=={version(name)}" for name in ("markdown-it-py", "rich")]
    there = without(here, "rich")
    assert pins(lacks(there), there) == [f"rich=={version('rich')}"]


def wheel(folder, name, *needs):
    lines = [f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {each}" for each in needs)]
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(["Metadata-Version: 2.1", *lines]))
        file.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{name}-1.0.dist-info/RECORD", "")


def test_what_a_package_needs_on_the_node_alone_is_installed_there_and_what_the_node_has_is_not(tmp_path):
    """As torch needs the CUDA libraries, which the laptop that submits does not have."""
    wheel(tmp_path, "brought", "cuda_libraries; sys_platform == 'linux'", "Node_Has>=1")
    wheel(tmp_path, "cuda_libraries")
    wheel(tmp_path, "node_has")
    there = Environment("3.11.7", {"node-has": "1.0", "another": "2.0"})
    settings = Brought.beside(there, ["brought==1.0"]).runtime_env(tmp_path)["uv"]
    options = [
        option.replace("${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}", str(tmp_path))
        for option in settings["uv_pip_install_options"]
    ]
    uv = str(Path(sys.executable).with_name("uv"))
    local = ["--no-index", "--find-links", tmp_path, "--python-platform", "linux", "--target", tmp_path / "installed"]
    subprocess.run(
        [uv, "pip", "install", *settings["packages"], *options, *local], check=True, capture_output=True, text=True
    )
    installed = {each.name.partition("-")[0] for each in (tmp_path / "installed").glob("*.dist-info")}
    assert installed == {"brought", "cuda_libraries"}


def test_another_ray_or_python_is_refused(here):
    there = without(here, ray="2.40.0")
    with pytest.raises(InputError, match=r"Ray is 2\.40\.0") as refusal:
        pins(lacks(there), there)
    assert version("ray") in refusal.value.remedy
    assert ">=3.11" in python_lack(replace(here, python="3.9.1"))


def test_the_extras_of_a_run_follow_from_its_addresses():
    assert extras_for(["/data", "s3://runs/a", "gs://b", "http://mlflow:5000", ""]) == ["gcs", "s3"]
