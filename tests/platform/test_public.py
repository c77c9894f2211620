"""The package's public functions refuse arguments of the wrong type by name, before anything starts."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from minitron.errors import InputError
from minitron_platform import load_recipe, plan, promote, run, submit

HEAD = "http://127.0.0.1:1"
WRONG = {
    "a number for a recipe's name": (lambda r: load_recipe(3), "name_or_path: 3", "give a path"),
    "one string for a list": (lambda r: load_recipe("x", "distill.steps=3"), "overrides: 'distill.steps=3'", "a list"),
    "a name for a recipe": (lambda r: run("smollm2-135m-cpu"), "recipe: 'smollm2-135m-cpu'", "load_recipe('smollm2"),
    "a dict for a recipe": (lambda r: plan({}), "recipe: a dict", "load_recipe(...)"),
    "no recipe to submit": (lambda r: submit(None, address=HEAD), "recipe: None", "load_recipe(...)"),
    "a number for a storage": (lambda r: plan(r, storage_path=3), "storage_path: 3", "give a path"),
    "a path for a server": (lambda r: run(r, tracking_uri=Path("x")), "tracking_uri: a PosixPath", "give a string"),
    "a word for a cluster": (lambda r: plan(r, address="clustr"), "'clustr'", "HOST:6379"),
    "a Jobs API for a cluster": (lambda r: run(r, address=HEAD), "Jobs API", "submit"),
    "no Jobs API": (lambda r: submit(r, address="head:8265"), "'head:8265'", "http://HOST:8265"),
    "a plan of another kind": (lambda r: run(r, planned=3), "planned: 3", "the result of plan"),
    "a number for a model": (lambda r: promote("runs", 3), "model: 3", "a string"),
    "a list for a version": (lambda r: promote("runs", "x", version=[1]), "version: a list", "a version"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_refused_by_name_before_anything_is_written(case, bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, problem, remedy = WRONG[case]
    with pytest.raises(InputError) as refused:
        call(load_recipe(str(bench / "recipe.yaml")))
    assert problem in refused.value.problem
    assert remedy in refused.value.remedy
    assert not list(tmp_path.iterdir())


def test_paths_may_be_path_objects(bench, tmp_path):
    planned = plan(load_recipe(bench / "recipe.yaml"), storage_path=tmp_path / "runs")
    assert planned.locations.storage == str(tmp_path / "runs")


def test_dir_lists_the_public_names():
    package = importlib.import_module("minitron_platform")
    assert set(dir(package)) == set(package.__all__)
