"""The package's public functions: what they accept, what `dir` lists and what a repr shows."""

import importlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny

import minitron
import minitron_search
from minitron import Architecture, ImportanceScores, estimate_importance, evaluate, linear_kl_div, prune
from minitron.architecture import axes_present, axes_that_differ
from minitron.architecture.hardware import hardware_notes
from minitron.architecture.published import published
from minitron.architecture.sizing import architecture_for
from minitron.data import (
    Rows,
    TextSource,
    documents,
    pack,
    rows_for_step,
    rows_of_steps,
    source_identity,
    tokenizer_identity,
)
from minitron.distill import (
    DistillConfig,
    LiveTeacher,
    Losses,
    StoredTeacher,
    TopKTeacher,
    default_losses,
    distill,
    read_curve,
    store_hidden,
    store_top_k,
)
from minitron.distill.fitting import fitting
from minitron.distill.gpu_memory import gpu_memory
from minitron.errors import InputError
from minitron.evaluation import (
    Task,
    check_requirements,
    check_tasks,
    heldout_metrics,
    interleaved_throughput,
    task_metric,
    teacher_targets,
    throughput,
)
from minitron.families import family_of
from minitron.models import load_source
from minitron.pruning import sliced_tensors
from minitron.pruning.iterative import prune_in_steps
from minitron.pruning.selection import kept_layers, select
from minitron_search import Limits

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


@dataclass(frozen=True)
class Valid:
    """Arguments of the right type, for the calls that get one wrong argument."""

    model: Any
    scores: ImportanceScores
    base: Architecture
    config: DistillConfig = field(default_factory=lambda: DistillConfig(steps=1))
    heads: torch.Tensor = field(default_factory=lambda: torch.ones(3, 2))


@pytest.fixture(scope="module")
def valid(scored):
    model, scores = scored
    return Valid(model, scores, Architecture.from_config(model.config))


class RowsInMemory:
    """Rows as `distill` needs them."""

    seq_length = 16

    def take(self, indices):
        return tiny.rows()[list(indices)]


# message: a call with one wrong argument
WRONG_TYPES = {
    "merge_heads: None is not a whole number": lambda v: prune(v.model, v.base, v.scores, merge_heads=None),
    "targets: a Llama.* is not a teacher": lambda v: distill(v.model, v.model, RowsInMemory(), v.config),
    "documents: 'rows' is not a DocumentBoundaries": lambda v: LiveTeacher(v.model, documents="rows"),
    "hidden: '29:13' is not a tuple": lambda v: Losses(hidden="29:13"),
    r"hidden\[0\]: 3 is not text": lambda v: Losses(hidden=(3,)),
    "temperature: '2' is not a number": lambda v: Losses(temperature="2"),
    "embedding: 'no' is not true or false": lambda v: Losses(embedding="no"),
    "decay_share: None is not a number": lambda v: DistillConfig(steps=1, decay_share=None),
    "steps: 2.5 is not a whole number": lambda v: DistillConfig(steps=2.5),
    "kind: 'json' is not supported": lambda v: TextSource("json", "text.jsonl"),
    "path: None is not text": lambda v: TextSource("jsonl", None),
    "limit: '5' is not a number": lambda v: Task("arc_easy", limit="5"),
    "latency_ms: '3' is not a number": lambda v: Limits(context=8, latency_ms="3"),
    "model: 'gpt2' is not a transformers model": lambda v: prune("gpt2", v.base, v.scores),
    "architecture: a dict is not an Architecture": lambda v: prune(v.model, v.base.to_dict(), v.scores),
    "scores: 'scores.safetensors' is not ImportanceScores": lambda v: prune(v.model, v.base, "scores.safetensors"),
    "layers: 3 is not a list": lambda v: prune(v.model, v.base, v.scores, layers=3),
    "layers.0: 'all' is not an int": lambda v: prune(v.model, v.base, v.scores, layers=["all"]),
    "scores: None is not ImportanceScores": lambda v: select(None, v.base, v.base),
    "base: None is not an Architecture": lambda v: select(v.scores, None, v.base),
    "target: 'llama' is not an Architecture": lambda v: select(v.scores, v.base, "llama"),
    "scores: 'scores' is not ImportanceScores": lambda v: kept_layers("scores", 4, 3),
    "num_layers: '4' is not a whole number": lambda v: kept_layers(v.scores, "4", 3),
    "target: None is not a whole number": lambda v: kept_layers(v.scores, 4, None),
    "source: None is not a function": lambda v: next(sliced_tensors(None, v.base, v.base, None)),
    "selection: None is not a Selection": lambda v: next(sliced_tensors(v.model.get_parameter, v.base, v.base, None)),
    "steps: '2' is not a whole number": lambda v: prune_in_steps(v.model, v.base, tiny.rows(), steps="2"),
    "name: None is not text": lambda v: published(None, v.base),
    "base: 'llama' is not an Architecture": lambda v: published("minitron-4b", "llama"),
    "base: a Llama.* is not an Architecture": lambda v: architecture_for(v.model, 1000),
    "parameters: '4.5e9' is not a number": lambda v: architecture_for(v.base, "4.5e9"),
    "multiple: None is not a whole number": lambda v: architecture_for(v.base, 1000, multiple=None),
    "target: None is not an Architecture": lambda v: hardware_notes(v.base, None),
    "architectures: None is not a list": lambda v: axes_present(None),
    "architectures.0: 'l' is not an Architecture": lambda v: axes_that_differ(["l"]),
    "model type None has no family table": lambda v: family_of(None),
    "rows: a list is not a tensor": lambda v: estimate_importance(v.model, [[1, 2]]),
    r"rows: torch.float32 \[1, 4\]": lambda v: estimate_importance(v.model, torch.ones(1, 4)),
    "layers: 'loss' is not a LayerScoring": lambda v: estimate_importance(v.model, tiny.rows(), layers=["loss"]),
    "config: an Architecture is not a transformers config": lambda v: Architecture.from_config(v.base),
    "source: None is not a model folder": lambda v: load_source(None),
    "revision: 3 is not text": lambda v: load_source("org/model", 3),
    "dtype: 'float32' is not a torch dtype": lambda v: load_source("org/model", dtype="float32"),
    "tokenizer: 'gpt2' is not a tokenizer": lambda v: evaluate(v.model, "gpt2", [Task("arc_easy")]),
    "tasks: 'arc_easy' is not a Task": lambda v: evaluate(v.model, tiny.tokenizer(), ["arc_easy"]),
    "tasks: None is not a list": lambda v: check_tasks(None),
    "tasks: 'piqa' is not a Task": lambda v: check_tasks(["piqa"]),
    "task: 'mmlu' is not a Task": lambda v: check_requirements("mmlu"),
    "metric: None is not text": lambda v: task_metric("piqa", None),
    "source: 'text' is not a TextSource": lambda v: next(documents("text")),
    "source: None is not a TextSource": lambda v: source_identity(None),
    "tokenizer: None is not a tokenizer": lambda v: tokenizer_identity(None),
    "tokenizer: 'bert' is not a tokenizer": lambda v: pack(
        TextSource("python-docs"), "bert", "rows", seq_length=8, train_rows=1, heldout_rows=1
    ),
    "target: None is not the path of a folder": lambda v: pack(
        TextSource("python-docs"), tiny.tokenizer(), None, seq_length=8, train_rows=1, heldout_rows=1
    ),
    "folder: None is not the path of a folder": lambda v: Rows.open(None, "train"),
    "batch_rows: '8' is not a whole number": lambda v: rows_for_step(100, "8", 0, 0),
    "steps: None is not a whole number": lambda v: rows_of_steps(100, 8, None, 0),
    "rows: a Tensor is not Rows": lambda v: distill(v.model, None, tiny.rows(), v.config),
    "student: './model' is not a transformers model": lambda v: distill("./model", None, tiny.rows(), v.config),
    "model: None is not a transformers model": lambda v: LiveTeacher(None),
    "head: None is not a Head": lambda v: StoredTeacher("targets", None, "key"),
    "folder: 3 is not the path of a folder": lambda v: TopKTeacher(3, "key"),
    "rows: 'rows' is not Rows": lambda v: store_hidden(lambda: v.model, "rows", "targets", key="key"),
    "rows: None is not Rows": lambda v: store_top_k(lambda: v.model, None, "targets", 4, key="key"),
    "checkpoints: None is not the path of a folder": lambda v: read_curve(None),
    "teacher: None is not an Architecture": lambda v: default_losses(v.base, None),
    "student: None is not an Architecture": lambda v: gpu_memory(None, v.config, 8),
    "config: None is not a DistillConfig": lambda v: fitting(v.base, None, 8, 10**9),
    "model: './model' is not a transformers model": lambda v: heldout_metrics("./model", tiny.rows()),
    "rows: None is not a tensor": lambda v: heldout_metrics(v.model, None),
    "teacher_model: None is not a transformers model": lambda v: teacher_targets(None, tiny.rows()),
    "models: a Llama.* is not a dict": lambda v: interleaved_throughput(v.model),
    r"models\['model'\]: None is not a transformers model": lambda v: throughput(None),
    "student_hidden: None is not a tensor": lambda v: linear_kl_div(None, v.heads, tiny.rows(), v.heads),
    "teacher_head: 'lm_head' is not a tensor or a Head": lambda v: linear_kl_div(v.heads, v.heads, v.heads, "lm_head"),
}


@pytest.mark.parametrize(("message", "call"), WRONG_TYPES.items(), ids=list(WRONG_TYPES))
def test_a_wrong_type_is_refused_with_the_argument_and_the_expected_type(message, call, valid):
    with pytest.raises(InputError, match=message) as caught:
        call(valid)
    assert caught.value.remedy


def test_the_method_and_the_search_name_no_option_or_key_of_the_platform():
    for folder in (Path(minitron.__file__).parent, Path(minitron_search.__file__).parent):
        for file in folder.rglob("*.py"):
            text = file.read_text()
            assert not re.search(r"--storage|teacher\.model:|data\.kind", text), file
