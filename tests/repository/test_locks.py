"""The lock files of CI match the bounds in pyproject.toml."""

from __future__ import annotations

import re
import tomllib

import pytest
from helpers.command import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


def _requirements(*extras):
    """Requirements of pyproject.toml, with those of the given extras, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def _pins(file):
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    # names and versions alone, without addresses or local folders
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def _lower_bound(requirement):
    bounds = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
    assert len(bounds) == 1, f"{requirement} in pyproject.toml needs one lower bound"
    return bounds[0]


INSTALLED = _requirements("dev", "lora", "s3")


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-lowest.txt"])
def test_a_lock_file_satisfies_pyproject(file):
    pins = _pins(file)
    assert [str(need) for name, need in INSTALLED.items() if not need.specifier.contains(pins[name])] == []


def test_the_lowest_lock_file_has_exactly_the_lower_bounds():
    pins = _pins("constraints-lowest.txt")
    bounds = {name: _lower_bound(requirement) for name, requirement in INSTALLED.items()}
    assert {name: pins[name] for name in bounds} == bounds, "run `make locks` and `make test-lowest`"


def test_every_extra_has_lower_bounds():
    assert all(
        _lower_bound(requirement)
        for requirement in _requirements("gcs", "azure", "bench", "postgres", "ifeval").values()
    )
