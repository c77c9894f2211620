"""What a recipe's file and its overrides may contain, and where their paths belong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from minitron.errors import InputError
from minitron_platform.planning.plan import plan
from minitron_platform.recipes.load import load_recipe
from minitron_platform.recipes.schema import Recipe


@pytest.fixture
def values(bench) -> dict[str, Any]:
    return yaml.safe_load((bench / "recipe.yaml").read_text())


def test_whole_numbers_may_be_written_with_an_exponent(bench):
    overrides = ["family.0.parameters=8e4", "distill.steps=1e3", "resources.workers=2e0"]
    recipe = load_recipe(bench / "recipe.yaml", overrides)
    assert (recipe.family[0].parameters, recipe.distill.steps, recipe.resources.workers) == (80_000, 1_000, 2)
    assert isinstance(recipe.distill.steps, int)


REFUSED = {
    "a fraction": ("distill.steps=8.5", "distill.steps: 8.5 is not valid: it should be a whole number"),
    "too many steps": (
        "distill.steps=1e23",
        "distill.steps: 99999999999999991611392 is not valid: input should be less",
    ),
    "a number of 5,000 digits": (f"distill.steps={'9' * 5000}", "--set distill.steps: the value is not valid YAML"),
    "a negative seed": ("distill.seed=-1", "distill.seed: -1 is not valid"),
    "a seed beyond NumPy's": ("search.sampler={candidates: 9, seed: 4294967296}", "search.sampler.seed: 4294967296"),
    "an infinite temperature": ("losses.temperature=.inf", "losses.temperature: inf is not valid"),
    "a temperature of almost 0": ("losses.temperature=1e-30", "losses.temperature: 1e-30 is not valid"),
    "a share of a GPU that Ray rounds to 0": ("resources.gpus_per_trial=1e-30", "use 0, or at least 0.001 of a GPU"),
    "an infinite range": ("family.0.space.num_layers={from: 1, to: .inf, step: 1}", "must be finite numbers"),
    "an infinite value of an axis": ("family.0.space.num_layers=[.inf]", "family.0.space.num_layers.0: inf"),
    "a range of workers that ends before it begins": ("resources.workers={min: 3, max: 2}", "min 3 is more than max 2"),
    "half a range of workers": ("resources.workers={min: 3}", "resources.workers.max: missing"),
    "a third end of a range of workers": (
        "resources.workers={min: 1, max: 2, m: 3}",
        "resources.workers.m: unknown key",
    ),
    "a day that does not exist": ("teacher.revision=2024-02-31", "--set teacher.revision: the value is not valid YAML"),
    "a number for a text": ("teacher.revision=1234", "it should be text: put it in quotes"),
    "an object of Python": ("distill.steps=!!python/object:os.system 1", "could not determine a constructor"),
    "an alias that contains itself": ("distill.steps=&a [*a]", "an alias that contains itself"),
    "a key twice": ("distill={steps: 1, steps: 2}", "the key 'steps' is already in line 1"),
    "a key that is a number": ("family.0.space={1: [2]}", "--set family.0.space: 1 is not a key"),
    "a digit that is not ASCII": ("family.²=1", "is not KEY=VALUE"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_override_that_cannot_be_meant_is_refused_by_its_key(bench, case):
    override, problem = REFUSED[case]
    with pytest.raises(InputError) as refused:
        load_recipe(bench / "recipe.yaml", [override])
    assert problem in refused.value.problem
    assert len(refused.value.problem) < 500


MULTIPLYING = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcde", "bcdef", strict=True)
)


MERGING = "a: &a {k: 1}\n" + "".join(  # 10^20 keys
    f"{name}: &{name} {{<<: [{', '.join(['*' + before] * 10**4)}]}}\n"
    for before, name in zip("abcde", "bcdef", strict=True)
)
CHAIN = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: *a{n - 1}, k{n}: 1}}\n" for n in range(1, 900))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: a\nteacher: {model: b}\nteacher: {model: c}\n", "the key 'teacher' is already in line 2, line 3"),
        ("name: a\ndistill:\n  steps: 1\n  steps: 2\n", "the key 'steps' is already in line 3, line 4"),
        ("a: &a\n  b: *a\n", "an alias that contains itself"),
        ("a: " + "[" * 40 + "]" * 40, "more than 32 levels of sections"),
        (MULTIPLYING, "more than 200,000 values"),
        (MERGING, "<< merges one section, not a list"),
        (CHAIN, "<< merges too many keys"),
        ("'two words': 1\n", "'two words' is not a key"),
        ("a: 1\nb: \x07\n", "not valid YAML (the character 7 is not allowed, line 2)"),
        ("- a\n", "contains no keys"),
        ("# " + "x" * 2**20, "1,048,578 bytes are too many"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_the_reason(tmp_path, text, problem):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError) as refused:
        load_recipe(tmp_path / "recipe.yaml")
    assert problem in refused.value.problem
    assert len(refused.value.problem) < 500


def test_a_misspelt_key_is_named_before_the_one_that_is_missing_for_it(tmp_path, values):
    values["data"]["train_rowz"] = values["data"].pop("train_rows")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputError) as refused:
        load_recipe(tmp_path / "recipe.yaml")
    assert "data.train_rowz: unknown key (and 1 more)" in refused.value.problem
    assert refused.value.remedy.startswith("did you mean 'train_rows'? ")


def test_a_recipe_with_few_keys_is_enough(tmp_path, values):
    training = {"steps": 100, "batch_rows": 4, "peak_lr": 1e-3}
    short = {key: values[key] for key in ("name", "teacher", "data", "family")}
    short |= {"calibrate": {"rows": 4}, "search": {"training": training}, "distill": training}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short))
    recipe = load_recipe(tmp_path / "short.yaml")
    assert (recipe.experiment, recipe.evaluate.tasks) == (recipe.name, [])
    assert (recipe.distill.min_lr, recipe.distill.warmup_steps) == (1e-4, 10)


def test_paths_of_a_file_belong_to_its_folder_and_those_of_overrides_to_the_current_one(
    bench, tmp_path, values, monkeypatch
):
    values["teacher"]["model"], values["data"]["path"] = "teacher", "*.jsonl"
    values["evaluate"]["tasks"][0]["data"] = "arc.jsonl"
    (bench / "relative.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "other.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(bench / "relative.yaml", ["evaluate.tasks.0.data=other.jsonl"])
    assert (recipe.teacher.model, recipe.data.path) == (str(bench / "teacher"), str(bench / "*.jsonl"))
    assert recipe.evaluate.tasks[0].data == str(tmp_path / "other.jsonl")

    values["data"]["path"] = "other.jsonl"
    (bench / "relative.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(
        InputError, match=r"data\.path: 'other\.jsonl' is not in .*bench.* but in the current folder"
    ) as refused:
        load_recipe(bench / "relative.yaml")
    assert "--set data.path=other.jsonl" in refused.value.remedy


def test_a_name_that_is_no_path_remains_a_name_on_the_hub(bench, values):
    values["teacher"]["model"] = "HuggingFaceTB/SmolLM2-135M"
    values["data"] |= {"kind": "hub", "path": "Salesforce/wikitext"}
    (bench / "hub.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(bench / "hub.yaml")
    assert (recipe.teacher.model, recipe.data.path) == ("HuggingFaceTB/SmolLM2-135M", "Salesforce/wikitext")


BELOW = {"minimum", "exclusiveMinimum", "gt"}  # pydantic writes the last one for bounds of a whole union
ABOVE = {"maximum", "exclusiveMaximum", "le"}
BOUNDS = BELOW | ABOVE


def _numbers(schema: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        bounds = {name: schema[name] for name in schema.keys() & BOUNDS}
        if schema.get("type") in ("integer", "number") and "enum" not in schema:
            yield key, bounds
        for name, inner in schema.items():
            if name == "anyOf":
                yield from _numbers([bounds | option for option in inner], key)
            else:
                yield from _numbers(inner, f"{key}.{name}")
    elif isinstance(schema, list):
        for inner in schema:
            yield from _numbers(inner, key)


def test_every_number_has_bounds():
    unbounded = {
        key.rsplit(".", 1)[-1]
        for key, bounds in _numbers(Recipe.model_json_schema())
        if not (BELOW & bounds.keys() and ABOVE & bounds.keys())
    }
    assert unbounded == {"clip_norm"}  # infinite: gradients are not clipped


@pytest.mark.parametrize("key", ["data.path", "teacher.model", "evaluate.tasks.0.data"])
def test_an_address_with_a_secret_is_refused_before_the_recipe_is_stored(bench, key):
    recipe = load_recipe(bench / "recipe.yaml")
    section, name = key.rsplit(".", 1)
    address = "s3://key:hunter2@bucket/file"
    with pytest.raises(InputError, match=f"{key}: an address with a password") as refused:
        load_recipe(bench / "recipe.yaml", [f"{key}={address}"])
    assert "hunter2" not in str(refused.value)
    if section == "data":  # a recipe that was made in Python
        changed = recipe.model_copy(update={section: recipe.data.model_copy(update={name: address})})
        with pytest.raises(InputError, match=r"^data\.path: an address with a password"):
            plan(changed)
