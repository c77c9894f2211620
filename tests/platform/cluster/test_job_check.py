"""What is compared between the packages of a cluster and those that Minitron needs. test_jobs.py asks a real head."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version

import pytest

from minitron.errors import InputError
from minitron_platform.cluster import probe
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


def test_another_ray_or_python_is_refused(here):
    there = without(here, ray="2.40.0")
    with pytest.raises(InputError, match=r"Ray is 2\.40\.0") as refusal:
        pins(lacks(there), there)
    assert version("ray") in refusal.value.remedy
    assert ">=3.11" in python_lack(replace(here, python="3.9.1"))


def test_the_extras_of_a_run_follow_from_its_addresses():
    assert extras_for(["/data", "s3://runs/a", "gs://b", "http://mlflow:5000", ""]) == ["gcs", "s3"]
