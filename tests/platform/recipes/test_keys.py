"""Errors of code that knows no recipe are named by the recipe key that they belong to."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers import tiny
from safetensors.torch import load_file, save_file

from minitron.errors import InputError
from minitron_platform import load_recipe, run
from minitron_platform.recipes.keys import named_by_key, section_keys
from minitron_platform.recipes.schema import Limits, Recipe
from minitron_platform.stages.distill import Distill

NAMED = {
    "a field of the section": ("data", "path: 'x' does not exist", "data.path: 'x' does not exist"),
    "a field of an inner section": ("family.0.limits", "batch: 0", "family.0.limits.batch: 0"),
    "a file": ("data", "/x/a.jsonl:3: no key 'text'", "data: /x/a.jsonl:3: no key 'text'"),
    "a file with the name of a section": ("data", "data.jsonl: no column", "data: data.jsonl: no column"),
    "a key that is not a section": ("teacher.model", "revision: main", "teacher.model: revision: main"),
    "a sentence": ("data", "the source ends after 3 rows", "data: the source ends after 3 rows"),
    "a key of the recipe": ("search", "family.0.limits: no candidate", "family.0.limits: no candidate"),
    "an index in it": ("search", "family.0.points.1: too slow", "family.0.points.1: too slow"),
    "a section": ("search", "resources: a trial takes 8 CPUs", "resources: a trial takes 8 CPUs"),
}


@pytest.mark.parametrize("case", NAMED)
def test_an_error_gets_the_key_unless_it_names_one(case):
    key, problem, expected = NAMED[case]
    with pytest.raises(InputError) as raised, named_by_key(key):
        raise InputError(problem, "change it")
    assert raised.value.problem == expected
    assert raised.value.remedy == "change it"


def test_the_keys_of_a_section_are_those_of_a_recipe_file():
    assert section_keys("") == [field.alias or name for name, field in Recipe.model_fields.items()]
    assert "register" in section_keys("")
    assert section_keys("family.0.limits") == list(Limits.model_fields)
    assert section_keys("teacher.model") == section_keys("nothing") == []


@pytest.fixture
def storage(bench, tmp_path, empty_database):
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_database, tmp_path / "runs" / "mlflow.db")
    return str(tmp_path / "runs")


def test_what_a_stage_finds_out_while_it_runs_is_named_by_its_key(bench, tmp_path, storage):
    """Planning reads neither all weights nor all text."""
    shutil.copytree(bench / "teacher", tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    recipe = load_recipe(str(bench / "recipe.yaml"), [f"teacher.model={tmp_path}/teacher"])
    with pytest.raises(InputError, match=r"^teacher\.model: /.*values that are not finite"):
        run(recipe, storage_path=storage, until="teacher")

    lines = [json.dumps({"text": text}) for text in tiny.texts(3, seed=5)]
    (tmp_path / "text.jsonl").write_text("\n".join([*lines, '{"body": "x"}']))
    recipe = load_recipe(str(bench / "recipe.yaml"), [f"data.path={tmp_path}/text.jsonl"])
    with pytest.raises(InputError, match=r"^data: .*text\.jsonl.*: no key 'text'"):
        run(recipe, storage_path=storage, until="data")


def test_a_distillation_of_one_models_own_is_named_by_that_models_key(bench):
    own = "{steps: 9, batch_rows: 1, peak_lr: 1.0e-3, min_lr: 1.0e-4, warmup_steps: 2}"
    for overrides, key in (([], "distill"), ([f"family.0.distill={own}"], "family.0.distill")):
        recipe = load_recipe(str(bench / "recipe.yaml"), overrides)
        assert Distill().recipe_key(recipe, recipe.family[0]) == key
