"""Fixtures of the tests of plans."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers import large_teacher

from minitron_platform import load_recipe, plan
from minitron_platform.planning.cluster import assumed_cluster


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """The overrides with which the recipe of an 8B teacher can be planned here."""
    return large_teacher.settings(large_teacher.make_teacher(tmp_path_factory.mktemp("large")))


@pytest.fixture
def disk(monkeypatch):
    """A function that makes the disk have this many bytes free."""

    def has(free):
        monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(total=free, used=0, free=free))

    return has


@pytest.fixture
def plan_large(large, tmp_path):
    """A function that plans the recipe of an 8B teacher, by default for 8 H100s."""

    def planned(*overrides, gpus=8, node=8, **cluster):
        recipe = load_recipe(large_teacher.RECIPE, [*large, *overrides])
        return plan(recipe, storage_path=tmp_path / "planned", cluster=assumed_cluster(gpus, node, **cluster))

    return planned
