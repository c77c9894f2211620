"""Fingerprints of the shipped recipe: finished stages in users' storages are found by them.

If one of these changes on purpose, raise the stage's `version`, say in CHANGELOG.md what is computed again, and put the new
fingerprints here. A refactoring changes none.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minitron.architecture import Architecture
from minitron.data import DocumentTokens
from minitron_platform.locations import Locations
from minitron_platform.recipes.load import load_recipe
from minitron_platform.stages import calibrate, evaluate, state
from minitron_platform.stages.evaluate import Figures
from minitron_platform.stages.finished import run_key
from minitron_platform.stages.order import steps
from minitron_platform.stages.search import trials_folder
from minitron_platform.stages.state import RunState

TEACHER = Architecture(30, 576, 1536, 9, 3, 64, 49_152, True)
STUDENT = replace(TEACHER, num_layers=20)
FIXED = {
    "dtype": "float32",
    "seq_length": 256,
    "train_tokens": 176 * 256,
    "winner": STUDENT,
    "document": DocumentTokens((), (2,), 1),
    "generation": "",  # as in records of earlier versions
    "table": {"distilled": Figures.model_construct(failures={})},
}

SHIPPED = {
    "run": "720783ab",
    "teacher": "6f35879a1ecb8cfb",
    "data": "70bcc1f108929b4e",
    "correct": "6b354c0f6f141978",
    "smollm2-90m calibrate": "b1be435b50cd05e3",
    "targets": "79fefa4c6914cae9",
    "smollm2-90m search": "8caa6a0eec3f1446",
    "smollm2-90m trials": "1930305e4b35342d",
    "smollm2-90m distill": "0fca18de83811171",
    "smollm2-90m evaluate": "58e752e7a296ff0c",
    "smollm2-90m register": "fe16a06b5a494cb6",
    "smollm2-70m calibrate": "59fa47e3b45d134b",
    "smollm2-70m search": "06854ac9dcf2e086",
    "smollm2-70m trials": "b7d9c2af774174c8",
    "smollm2-70m distill": "2fe9bc95a1c0a515",
    "smollm2-70m evaluate": "9de6909edd96a7b1",
    "smollm2-70m register": "ac8b91c81c2b2c81",
}


@pytest.fixture
def fingerprints(monkeypatch):
    """A function that gives the fingerprints of a recipe's stages, as if each had left outputs with fixed values."""
    # besides the recipe they depend on the hardware's dtype, the files of teacher and text, and lm-eval's version
    monkeypatch.setattr(state, "compute_dtype", lambda name: torch.float32)
    monkeypatch.setattr(state, "source_identity", lambda model, revision: "teacher")
    monkeypatch.setattr(state, "text_identity", lambda source: "text")
    monkeypatch.setattr(evaluate, "documents_identity", lambda path: "documents")
    monkeypatch.setattr(evaluate, "version", lambda package: "0.4")

    def outputs(stage, member):
        values = {name: FIXED.get(name, f"{stage.name}.{name}") for name in stage.output_type.model_fields}
        if "architecture" in values:
            values["architecture"] = STUDENT if member else TEACHER
        return stage.output_type.model_construct(**values)

    def compute(recipe):
        run = RunState(recipe, Locations("/runs", "/runs", "sqlite:////runs/mlflow.db"), run_key(recipe))
        found = {"run": run.run_key.rpartition("-")[2]}
        for stage, member in steps(recipe):
            run.current = member
            name = f"{member.model} {stage.name}" if member else stage.name
            found[name] = run.fingerprint(stage)
            run.finish(stage, outputs(stage, member))
            if stage.name == "search":
                found[f"{member.model} trials"] = Path(trials_folder(run)).name
        return found

    return compute


def test_the_stages_of_the_shipped_recipe_keep_their_fingerprints(fingerprints):
    assert fingerprints(load_recipe("smollm2-135m-cpu")) == SHIPPED


def test_keys_that_change_no_result_change_no_fingerprint(fingerprints):
    shipped = fingerprints(load_recipe("smollm2-135m-cpu"))
    without = ["resources.workers=1", "description=other", "distill.checkpoint_every=7", "evaluate.batch_rows=3"]
    other = fingerprints(load_recipe("smollm2-135m-cpu", without))
    assert {name for name in shipped if shipped[name] != other[name]} == {"run"}


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ([], ""),
        (["data.kind=jsonl", "data.path=chats.jsonl", "data.messages=messages"], "data"),
        (["evaluate.tasks.0.chat_template=true"], "evaluate"),
        (["search.evaluate={keep: 1, tasks: [{name: gsm8k, chat_template: true}]}"], "search"),
    ],
)
def test_another_chat_template_computes_again_what_uses_it(fingerprints, monkeypatch, settings, changed):
    recipe = load_recipe("smollm2-135m-cpu", settings)
    before = fingerprints(recipe)
    monkeypatch.setitem(FIXED, "chat_template", "another")
    after = fingerprints(recipe)
    differing = {name.split()[-1] for name in before if before[name] != after[name]}
    assert changed in differing if changed else not differing


def test_other_generation_settings_evaluate_again(fingerprints, monkeypatch):
    recipe = load_recipe("smollm2-135m-cpu", ["search.evaluate={keep: 1, tasks: [{name: gsm8k}]}"])
    before = fingerprints(recipe)
    monkeypatch.setitem(FIXED, "generation", "of a newer version")
    after = fingerprints(recipe)
    assert {name.split()[-1] for name in before if before[name] != after[name]} == {"search", "evaluate"}


def test_few_shot_examples_of_local_documents_are_drawn_again(fingerprints, monkeypatch):
    monkeypatch.setattr(calibrate, "documents_identity", lambda path: "documents")
    task = "{name: piqa, data: documents, num_fewshot: 5}"
    settings = [f"evaluate.tasks=[{task}]", f"calibrate.task={task}", "calibrate.layers=task"]
    recipe = load_recipe("smollm2-135m-cpu", settings)
    after = fingerprints(recipe)
    monkeypatch.setattr("minitron.evaluation.tasks.EXAMPLES", 1)
    before = fingerprints(recipe)
    differing = {name.split()[-1] for name in before if before[name] != after[name]}
    assert {"calibrate", "evaluate"} <= differing
