"""The sections of a recipe match the settings of the method: a field that only one of the two has is listed here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
import yaml

from minitron import Architecture
from minitron.errors import InputError
from minitron_platform.recipes import build, candidates, schema
from minitron_platform.recipes.candidates import family_candidates
from minitron_platform.recipes.load import load_recipe

TEACHER = Architecture(5, 48, 96, 6, 2, 24, 300, True)  # that of the `bench` fixture
TASK = {"name": "arc_easy"}


@dataclass(frozen=True)
class Pair:
    """A section and the settings made of it. Each of `changes` gives one field of the section another value than in `base`.

    Fields of the section that the settings take no part of are `elsewhere`, with what does take them; fields of the settings
    that no recipe sets are `not_in_recipes`, with the reason.
    """

    section: type
    base: dict[str, Any]
    changes: dict[str, Any]
    make: Any
    elsewhere: dict[str, str]
    not_in_recipes: dict[str, str]


def _with(recipe: schema.Recipe, **sections: Any) -> schema.Recipe:
    return recipe.model_copy(update=sections)


def _losses(recipe, section):
    return build.distillation_losses(_with(recipe, losses=section), TEACHER, TEACHER)[0]


def _limits(recipe, section):
    return build.limits(recipe, recipe.family[0].model_copy(update={"limits": section}))


def _halving(recipe, section):
    return build.halving(recipe.search.model_copy(update={"halving": section}))


def _benchmarks(recipe, section):
    return build.benchmarks(_with(recipe, search=recipe.search.model_copy(update={"evaluate": section})), "tokenizer")


OF_THE_SCORING = "minitron.importance.estimate_importance, and LayerScoring"
PAIRS = {
    "losses": Pair(
        schema.Losses,
        {"hidden": ["last:last"]},
        {
            "logits": "mse",
            "temperature": 2.0,
            "cross_entropy": 0.5,
            "top_k": 4,
            "hidden": ["last-1:last-1"],
            "hidden_loss": "mse",
            "embedding": True,
            "attention": ["last:last"],
            "mlp_input": ["last:last"],
            "alpha": 2.0,
        },
        _losses,
        {},
        {},
    ),
    "training": Pair(
        schema.Training,
        {"steps": 10, "batch_rows": 8, "peak_lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 1},
        {
            "steps": 11,
            "batch_rows": 9,
            "micro_batch_rows": 2,
            "peak_lr": 2e-3,
            "min_lr": 2e-4,
            "warmup_steps": 2,
            "schedule": "wsd",
            "decay_share": 0.3,
            "weight_decay": 0.1,
            "clip_norm": 2.0,
            "seed": 1,
            "max_skipped_steps": 1,
            "checkpoint_every": 5,
            "evaluate_every": 5,
            "shard": True,
            "activation_checkpointing": "full",
            "optimizer": "adamw-offload",
            "compile": True,
            "cuda_graphs": True,
            "fp8": "rowwise",
            "deterministic": True,
        },
        lambda recipe, section: build.distill_config(section),
        {"evaluate_tasks_every": "TrainTask.tasks_every"},
        {
            "betas": "those of the papers",
            "report_every": "every step is reported",
            "peak_flops": "measured on the device",
        },
    ),
    "task": Pair(
        schema.Task,
        TASK,
        {"name": "arc_challenge", "data": "folder", "num_fewshot": 5, "limit": 10, "chat_template": True},
        lambda recipe, section: build.lm_eval_tasks([section])[0],
        {},
        {
            "allow_code": "evaluate.allow_code, for all tasks",
            "folder": "evaluate.task_folder, for all tasks",
            "label": "follows from the tasks before it",
        },
    ),
    "data": Pair(
        schema.Data,
        {"kind": "jsonl", "seq_length": 32, "train_rows": 8, "heldout_rows": 8},
        {
            "kind": "parquet",
            "path": "file",
            "key": "body",
            "name": "en",
            "split": "test",
            "revision": "main",
            "template": "{body}",
            "messages": "chat",
            "separator": {"kind": "text", "separator": "---"},
            "on_missing": "skip",
            "min_characters": 3,
            "max_characters": 100,
        },
        lambda recipe, section: build.text_sources(section)["data"],
        {
            "seq_length": "minitron.data.pack",
            "train_rows": "minitron.data.pack",
            "heldout_rows": "minitron.data.pack",
            "heldout_fraction": "minitron.data.pack",
            "sources": "build.text_sources",
            "heldout": "build.heldout_source",
            "drop_duplicates": "minitron.data.pack",
            "add_bos": "build.document_tokens",
            "separate_documents": "build.separates_documents",
        },
        {"weight": "of data.sources"},
    ),
    "limits": Pair(
        schema.Limits,
        {},
        {
            "context": 77,
            "batch": 2,
            "flops_per_token": 1e6,
            "kv_cache_bytes": 1e6,
            "memory_bytes": 1e6,
            "latency_ms": 5.0,
            "token_latency_ms": 5.0,
        },
        _limits,
        {},
        {},
    ),
    "halving": Pair(schema.Halving, {}, {"keep": 0.25, "grace": "stable"}, _halving, {}, {}),
    "benchmarks of the search": Pair(
        schema.Benchmarked,
        {"tasks": [TASK]},
        {"keep": 2, "tasks": [TASK, {"name": "hellaswag"}]},
        _benchmarks,
        {},
        {
            "tokenizer": "the teacher's",
            "batch_rows": "evaluate.batch_rows",
            "add_bos": "data.add_bos",
            "chat_template": "the teacher's",
            "generation": "the teacher's",
        },
    ),
    "layers of calibrate": Pair(
        schema.Calibrate,
        {"rows": 8, "layers": "task", "task": TASK},
        {
            "layers": {"layers": "loss", "task": None},
            "task": {"name": "hellaswag"},
            "layer_rows": 2,
            "depth": "iterative",
        },
        lambda recipe, section: build.layer_scoring(section, 5, [3, 4]),
        {
            "rows": "minitron.importance.estimate_importance",
            "batch_aggregation": "minitron.importance.estimate_importance",
            "sequence_aggregation": "minitron.importance.estimate_importance",
            "neurons": "minitron.importance.estimate_importance",
            "steps": "Recalibration",
            "merge_heads": "PruningSource",
        },
        {},
    ),
    "steps of calibrate": Pair(
        schema.Calibrate,
        {"rows": 8},
        {
            "rows": 9,
            "batch_aggregation": "var",
            "sequence_aggregation": "var",
            "neurons": "pre",
            "layers": "logit_error",
            "layer_rows": 2,
            "steps": 2,
        },
        lambda recipe, section: build.recalibration(section, "rows"),
        {
            "task": "refused with steps, which measure layers without benchmarks",
            "depth": "contiguous blocks alone",
            "merge_heads": "the pruning source",
        },
        {"rows": "the folder of packed rows", "separate_documents": "data.separate_documents"},
    ),
    "pruning by calibrate": Pair(
        schema.Calibrate,
        {"rows": 8},
        {"depth": "scattered", "layers": "cosine", "merge_heads": 1, "steps": 2},
        lambda recipe, section: build.pruning_source(section, folder="", scores="", dtype="", rows=""),
        {
            "rows": OF_THE_SCORING,
            "batch_aggregation": OF_THE_SCORING,
            "sequence_aggregation": OF_THE_SCORING,
            "neurons": OF_THE_SCORING,
            "layer_rows": OF_THE_SCORING,
            "task": OF_THE_SCORING,
        },
        {"folder": "the base model's", "scores": "what calibrate wrote", "dtype": "teacher.dtype, resolved"},
    ),
}


@pytest.fixture
def recipe(bench):
    return load_recipe(str(bench / "recipe.yaml"), [])


def _section(pair: Pair, **changes: Any) -> Any:
    return pair.section.model_validate(pair.base | changes)


@pytest.mark.parametrize("name", PAIRS)
def test_every_field_of_a_section_becomes_a_setting_and_every_setting_has_a_field(recipe, name):
    pair = PAIRS[name]
    assert set(pair.changes) | set(pair.elsewhere) == set(pair.section.model_fields)
    assert not set(pair.changes) & set(pair.elsewhere)
    before = pair.make(recipe, _section(pair))
    reached = set()
    for field, value in pair.changes.items():
        changes = value if isinstance(value, dict) and field in value else {field: value}
        after = pair.make(recipe, _section(pair, **changes))
        changed = {f.name for f in fields(after) if getattr(after, f.name) != getattr(before, f.name)}
        assert changed, f"{field} changes nothing"
        reached |= changed
    assert reached | set(pair.not_in_recipes) == {field.name for field in fields(before)}
    assert not reached & set(pair.not_in_recipes)


def test_a_task_at_two_numbers_of_examples_has_two_scores():
    tasks = [schema.Task(name=name, num_fewshot=shots) for name, shots in (("mmlu", 5), ("piqa", 0), ("mmlu", 0))]
    assert [task.key for task in build.lm_eval_tasks(tasks)] == ["mmlu", "piqa", "mmlu_0shot"]
    assert [task.key for task in build.lm_eval_tasks(tasks[1:])] == ["piqa", "mmlu"]
    with pytest.raises(InputError, match="'mmlu' is given twice with num_fewshot 0"):
        build.lm_eval_tasks([*tasks, tasks[-1]])


def test_candidates_are_compared_on_logit_losses_alone(recipe):
    section = _section(PAIRS["losses"], **{k: v for k, v in PAIRS["losses"].changes.items() if k not in ("logits",)})
    whole = build.distillation_losses(_with(recipe, losses=section), TEACHER, TEACHER)[0]
    part = build.logit_losses(_with(recipe, losses=section))
    assert not part.needs_live_teacher
    same = {field.name for field in fields(part) if getattr(part, field.name) == getattr(whole, field.name)}
    assert same == {"logits", "temperature", "cross_entropy", "top_k"}


@pytest.mark.parametrize("make", [build.logit_losses, lambda r: build.distillation_losses(r, TEACHER, TEACHER)])
def test_a_value_that_the_method_refuses_is_named_by_its_recipe_key(recipe, make):
    losses = schema.Losses(logits="none")
    with pytest.raises(InputError, match=r"^losses\.logits: none without a cross_entropy") as refused:
        make(_with(recipe, losses=losses))
    assert refused.value.remedy == "give cross_entropy a weight, for example 1.0"


def test_the_space_of_a_model_is_enumerated_once(bench, monkeypatch):
    bases = []
    enumerate_all = candidates.candidates

    def count(base, *arguments, **options):
        bases.append(base)
        return enumerate_all(base, *arguments, **options)

    monkeypatch.setattr(candidates, "candidates", count)
    values = yaml.safe_load((bench / "recipe.yaml").read_text())
    values["family"].append(values["family"][0] | {"model": "tiny-next", "start": "previous", "parameters": 60_000})
    values["search"] |= {"sampler": {"candidates": 500}, "forward": {"keep": 4}}
    (bench / "once.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(str(bench / "once.yaml"), [])
    family = family_candidates(recipe, TEACHER)
    larger = family["tiny-student"]
    assert not larger.sampled
    assert bases == [TEACHER, *larger.architectures]
