"""A benchmark that cannot run is refused by `plan`, with its key, not after hours of work."""

from __future__ import annotations

import sys

import pytest
from helpers.evaluating import arc_documents, write_jsonl

from minitron.errors import InputError
from minitron.evaluation import Task, check_requirements, check_tasks
from minitron_platform import plan
from minitron_platform.recipes.load import load_recipe


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty hub cache, with the hub switched off by the user."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hf"


def test_packages_that_a_definition_imports_are_named_with_the_command(tmp_path, monkeypatch):
    """Also the packages of modules that it imports indirectly."""
    real = sys.modules["minitron.evaluation.requirements"].find_spec
    monkeypatch.setattr(
        "minitron.evaluation.requirements.find_spec",
        lambda name: None if name in ("immutabledict", "langdetect") else real(name),
    )
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.ifeval.utils", raising=False)
    task = Task("ifeval", str(write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a"}])))
    check_tasks([task])
    with pytest.raises(InputError, match="needs immutabledict, langdetect, which is not installed") as refusal:
        check_requirements(task)
    assert refusal.value.remedy == "pip install 'minitron[ifeval]'"
    assert "lm_eval.tasks.ifeval.utils" not in sys.modules


def test_more_few_shot_examples_than_there_are_documents_is_refused(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", arc_documents(3))
    write_jsonl(tmp_path / "train.jsonl", arc_documents(8))
    check_tasks([Task("arc_easy", str(tmp_path), num_fewshot=8)])
    with pytest.raises(InputError, match=r"num_fewshot is 20, but the split 'train' of .* has 8 examples") as refusal:
        check_tasks([Task("arc_easy", str(tmp_path), num_fewshot=20)])
    assert "8 at most" in refusal.value.remedy


def test_hub_documents_that_are_not_in_the_cache_are_refused(empty_cache):
    with pytest.raises(
        InputError, match=r"the hub's dataset allenai/ai2_arc, cannot be loaded \(HF_HUB_OFFLINE is set"
    ) as refusal:
        check_requirements(Task("arc_easy"))
    assert "local documents as the task's data" in refusal.value.remedy
    (empty_cache / "datasets" / "allenai___ai2_arc").mkdir(parents=True)
    check_requirements(Task("arc_easy"))


def test_a_hub_metric_that_is_not_in_the_cache_is_refused(empty_cache, tmp_path, monkeypatch):
    documents = str(write_jsonl(tmp_path / "validation.jsonl", [{"question": "a"}]))
    with pytest.raises(InputError, match="the metric 'rouge' cannot be loaded"):
        check_requirements(Task("noticia", documents, allow_code=True))
    (empty_cache / "modules/evaluate_modules/metrics/evaluate-metric--rouge").mkdir(parents=True)
    check_requirements(Task("noticia", documents, allow_code=True))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rouge").mkdir()
    with pytest.raises(InputError, match="'rouge' in the working folder would be run"):
        check_requirements(Task("noticia", documents, allow_code=True))


def test_answers_that_are_as_long_as_the_context_are_refused(tmp_path):
    task = Task("gsm8k", str(write_jsonl(tmp_path / "test.jsonl", [{"question": "a", "answer": "#### 1"}])))
    check_requirements(task, 257)
    with pytest.raises(InputError, match="256 tokens, but the model's context has 256"):
        check_requirements(task, 256)


def test_plan_names_the_recipe_key_of_a_benchmark_that_cannot_run(bench, empty_cache):
    options = [f"evaluate.tasks=[{{name: arc_easy, data: {bench}/arc.jsonl}}, {{name: wikitext}}]"]
    recipe = load_recipe(str(bench / "recipe.yaml"), options)
    with pytest.raises(InputError, match=r"evaluate\.tasks\.1: task 'wikitext': its documents"):
        plan(recipe, storage_path=str(bench / "unused"))


def test_plan_names_the_recipe_keys_of_all_benchmarks_that_cannot_run(bench, tmp_path):
    """What their documents lack, too; and those of a run in which only the evaluation is left are not looked at."""
    documents = arc_documents(3)
    del documents[1]["question"]
    write_jsonl(tmp_path / "arc.jsonl", documents)
    tasks = f"{{name: arc_easy, data: {tmp_path}/arc.jsonl}}, {{name: mbpp, data: {tmp_path}/gone}}"
    recipe = load_recipe(str(bench / "recipe.yaml"), [f"evaluate.tasks=[{tasks}]"])
    with pytest.raises(InputError, match=r"^3 problems:") as refusal:
        plan(recipe, storage_path=str(tmp_path / "unused"))
    first, second, third = refusal.value.problem.splitlines()[1:]
    assert f"evaluate.tasks.0: task 'arc_easy': {tmp_path}/arc.jsonl, line 2: " in first
    assert f"evaluate.tasks.1: {tmp_path}/gone: no such file or folder" in second
    assert "evaluate.tasks.1: task 'mbpp': it runs code" in third
    recipe = load_recipe(str(bench / "recipe.yaml"), [f"evaluate.tasks=[{tasks.partition('}, ')[0]}}}]"])
    with pytest.raises(InputError, match=r"^evaluate\.tasks\.0: task 'arc_easy': .*arc\.jsonl, line 2: .*'question'"):
        plan(recipe, storage_path=str(tmp_path / "unused"))
