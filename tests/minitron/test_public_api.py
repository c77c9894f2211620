"""The package's public functions: what they accept, what `dir` lists and what a repr shows."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from helpers import tiny

import minitron
import minitron_search
from minitron import Architecture, estimate_importance, evaluate, linear_kl_div, prune
from minitron.data import documents
from minitron.distill import DistillConfig, distill
from minitron.errors import InputError
from minitron.evaluation import (
    Task,
    check_requirements,
    check_tasks,
    heldout_metrics,
    interleaved_throughput,
    teacher_targets,
    throughput,
)
from minitron.pruning.selection import select

PACKAGES = ("data", "distill", "evaluation", "importance", "pruning", "architecture", "families")


@pytest.mark.parametrize("package", ["minitron", *(f"minitron.{name}" for name in PACKAGES)])
def test_dir_lists_every_public_name(package):
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    assert all(hasattr(module, name) for name in module.__all__)


def test_dir_of_the_package_lists_names_that_are_not_loaded_yet():
    assert {"prune", "evaluate", "estimate_importance", "Architecture"} <= set(dir(minitron))


@pytest.fixture(scope="module")
def scored():
    model = tiny.model("llama", True)
    return model, estimate_importance(model, tiny.rows())


def test_no_repr_prints_tensors(scored):
    model, scores = scored
    base = Architecture.from_config(model.config)
    for value in (scores, select(scores, base, base)):
        assert "tensor(" not in repr(value)
        assert len(repr(value)) < 1000


def test_a_wrong_type_is_refused_with_the_argument_and_the_expected_type(scored):
    model, scores = scored
    base = Architecture.from_config(model.config)
    config = DistillConfig(steps=1)
    heads = torch.ones(3, 2)
    calls = {
        "model: 'gpt2' is not a transformers model": lambda: prune("gpt2", base, scores),
        "architecture: a dict is not an Architecture": lambda: prune(model, base.to_dict(), scores),
        "scores: 'scores.safetensors' is not ImportanceScores": lambda: prune(model, base, "scores.safetensors"),
        "rows: a list is not a tensor": lambda: estimate_importance(model, [[1, 2]]),
        r"rows: torch.float32 \[1, 4\]": lambda: estimate_importance(model, torch.ones(1, 4)),
        "layers: 'loss' is not a LayerScoring": lambda: estimate_importance(model, tiny.rows(), layers=["loss"]),
        "config: an Architecture is not a transformers config": lambda: Architecture.from_config(base),
        "tokenizer: 'gpt2' is not a tokenizer": lambda: evaluate(model, "gpt2", [Task("arc_easy")]),
        "tasks: 'arc_easy' is not a Task": lambda: evaluate(model, tiny.tokenizer(), ["arc_easy"]),
        "source: 'text' is not a TextSource": lambda: next(documents("text")),
        "rows: a Tensor is not Rows": lambda: distill(model, None, tiny.rows(), config),
        "student: './model' is not a transformers model": lambda: distill("./model", None, tiny.rows(), config),
        "model: './model' is not a transformers model": lambda: heldout_metrics("./model", tiny.rows()),
        "rows: None is not a tensor": lambda: heldout_metrics(model, None),
        "teacher_model: None is not a transformers model": lambda: teacher_targets(None, tiny.rows()),
        "models: a Llama.* is not a dict": lambda: interleaved_throughput(model),
        r"models\['model'\]: None is not a transformers model": lambda: throughput(None),
        "tasks: 'piqa' is not a Task": lambda: check_tasks(["piqa"]),
        "task: 'mmlu' is not a Task": lambda: check_requirements("mmlu"),
        "student_hidden: None is not a tensor": lambda: linear_kl_div(None, heads, tiny.rows(), heads),
        "teacher_head: 'lm_head' is not a tensor or a Head": lambda: linear_kl_div(heads, heads, heads, "lm_head"),
    }
    for message, call in calls.items():
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert caught.value.remedy


def test_the_method_and_the_search_name_no_option_or_key_of_the_platform():
    for folder in (Path(minitron.__file__).parent, Path(minitron_search.__file__).parent):
        for file in folder.rglob("*.py"):
            text = file.read_text()
            assert not re.search(r"--storage|teacher\.model:|data\.kind", text), file
