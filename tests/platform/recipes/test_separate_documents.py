"""When the documents of a row are kept apart, and whose results depend on it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from minitron.errors import InputError
from minitron_platform.planning.plan import plan
from minitron_platform.recipes import build
from minitron_platform.recipes.load import load_recipe
from minitron_platform.stages.finished import run_key


@pytest.mark.parametrize(
    ("overrides", "on_cpu", "on_gpu"),
    [
        ([], False, True),
        (["data.separate_documents=true"], True, True),
        (["data.separate_documents=false"], False, False),
        (["resources.gpus_per_trial=0"], False, False),
        (["resources.gpus_per_worker=0"], False, False),
        (["resources.gpus_per_worker=2"], False, True),
        (["data.messages=chat"], False, False),  # in most templates a message ends as a document does
    ],
)
def test_documents_are_kept_apart_where_models_run_on_gpus(bench, monkeypatch, overrides, on_cpu, on_gpu):
    recipe = load_recipe(str(bench / "recipe.yaml"), overrides)
    assert build.separates_documents(recipe) == on_cpu
    monkeypatch.setattr(build, "device", lambda: torch.device("cuda"))
    assert build.separates_documents(recipe) == on_gpu
    # on a cluster its workers' devices count, whatever the driver has
    assert build.separates_documents(recipe, on_gpus=False) == on_cpu
    monkeypatch.setattr(build, "device", lambda: torch.device("cpu"))
    assert build.separates_documents(recipe, on_gpus=True) == on_gpu


def test_a_run_keeps_its_name_unless_the_key_is_given(bench):
    recipes = [load_recipe(str(bench / "recipe.yaml"), [f"data.separate_documents={x}"]) for x in ("auto", "true")]
    default, separate = (run_key(recipe) for recipe in recipes)
    assert run_key(load_recipe(str(bench / "recipe.yaml"))) == default != separate


def test_the_plan_says_that_documents_see_each_other_on_cpus_and_how_to_change_it(bench, tmp_path):
    planned = plan(load_recipe(str(bench / "recipe.yaml")), storage_path=str(tmp_path / "runs"))
    assert planned.documents_text == (
        "those in one row attend to each other; only GPUs separate them at no cost (data.separate_documents)"
    )


def test_documents_are_not_told_apart_where_messages_end_like_them(bench, tmp_path):
    copy = shutil.copytree(bench, tmp_path / "bench")
    chat = [{"role": role, "content": "river stone"} for role in ("user", "assistant")]
    (copy / "chats.jsonl").write_text(json.dumps({"chat": chat}) + "\n")
    template = copy / "teacher" / "chat_template.jinja"  # tests of this process may have left other models beside it
    overrides = [f"data.path={copy / 'chats.jsonl'}", "data.messages=chat", f"teacher.model={template.parent}"]
    for each, fits in (("<eos>", False), ("!", True)):
        template.write_text(f"{{% for m in messages %}}{{{{ m.role }}}} {{{{ m.content }}}}{each}{{% endfor %}}<eos>")
        recipe = load_recipe(str(copy / "recipe.yaml"), [*overrides, "data.separate_documents=true"])
        if fits:
            assert plan(recipe, storage_path=str(tmp_path / "runs")).documents_text.startswith(
                "those in one row do not"
            )
        else:
            with pytest.raises(InputError, match=r"true, but the chat template for data\.messages ends messages"):
                plan(recipe, storage_path=str(tmp_path / "runs"))
    planned = plan(load_recipe(str(copy / "recipe.yaml"), overrides), storage_path=str(tmp_path / "runs"))
    assert planned.documents_text.endswith("because chats are not told apart (data.separate_documents)")
