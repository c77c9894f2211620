"""The public interface of the search package: its names, its argument checks, and its events."""

from __future__ import annotations

import subprocess
import sys
import types
from dataclasses import fields, make_dataclass, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from helpers.command import ROOT, environment

import minitron_search
from minitron import Architecture
from minitron.distill import DistillConfig, Losses, StepReport
from minitron.distill.inputs import DistillInputs
from minitron.errors import InputError, MinitronError
from minitron.evaluation import Task
from minitron.pruning.source import PruningSource
from minitron_search import (
    Halving,
    Pool,
    SearchTask,
    Space,
    architecture_search,
    candidates,
    sample,
    score_all,
    search,
)
from minitron_search.benchmarks import Benchmarks
from minitron_search.events import Event, from_tune, to_tune
from minitron_search.ray_patches import keep_workers
from minitron_search.trial_store import forward_score, rung_result, trial_folder, trial_result

BASE = Architecture(4, 64, 96, 8, 2, 8, 300, True)


def test_dir_lists_the_public_names():
    assert dir(minitron_search) == sorted(minitron_search.__all__)
    assert minitron_search.search is architecture_search.search


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: candidates({"num_layers": 4}, {}, 0, 1), "base: a dict is not an Architecture"),
        (lambda: candidates(BASE, ["num_layers"], 0, 1), "space: a list is not a dict"),
        (lambda: candidates(BASE, {"num_layers": 3}, 0, 1), "space.num_layers: 3 is not a list"),
        (lambda: candidates(BASE, {"num_layers": ["3"]}, 0, 1), "space.num_layers.0: '3' is not a number"),
        (lambda: candidates(BASE, {}, "0", 1), "low: '0' is not a number"),
        (lambda: Space(BASE, {}, 0, None), "high: None is not a number"),
        (lambda: Space(BASE, {}, 0, 1, limits={"context": 1}), "limits: a dict is not a Limits"),
        (lambda: sample(len, BASE, 3), "space: an Architecture is not a Space"),
        (lambda: Pool(None), "scratch: None is not text"),
        (lambda: Pool("x", share={"CPU": "1"}), "share.CPU: '1' is not a number"),
        (lambda: Pool("x", workers=0), "workers: 0"),
        (lambda: Pool("x", max_failures=True), "max_failures: True is not a whole number"),
        (lambda: Halving(keep=0), "keep: 0"),
        (lambda: Halving(grace="late"), "grace: 'late' is not a number"),
        (lambda: SearchTask(torch.ones(9999), None, None, None, "x"), "materials: a Tensor is not a DistillInputs"),
        (lambda: search(BASE, [BASE]), "task: an Architecture is not a SearchTask"),
        (lambda: score_all("x", [BASE], Pool("x")), "task: 'x' is not a SearchTask"),
    ],
)
def test_a_wrong_argument_is_named(call, named):
    with pytest.raises(InputError) as raised:
        call()
    assert named in raised.value.problem
    assert len(raised.value.problem) < 100
    assert raised.value.remedy


def test_the_arguments_of_a_search_are_checked_before_anything_starts(made, tmp_path):
    materials, origin, found = made
    task = SearchTask(materials, origin, DistillConfig(steps=2), Losses(), str(tmp_path))
    for wrong, named in (
        ({"architectures": BASE}, "architectures: an Architecture is not a list"),
        ({"architectures": [str(BASE)]}, "architectures.0: '"),
        ({"architectures": []}, "architectures: the list is empty"),
        ({"architectures": found, "forward_keep": "2"}, "forward_keep: '2' is not a whole number"),
        ({"architectures": found, "halving": 0.5}, "halving: 0.5 is not a Halving"),
        ({"architectures": found, "pool": "tune"}, "pool: 'tune' is not a Pool"),
    ):
        with pytest.raises(InputError) as raised:
            search(task, **wrong)
        assert named in raised.value.problem


def test_relative_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = DistillInputs("teacher", "t", "float32", "rows", "targets/train", "s3://bucket/heldout")
    task = SearchTask(inputs, PruningSource("teacher", "scores", "float32"), DistillConfig(steps=2), Losses(), "trials")
    inside = [task.folder, task.origin.folder, task.origin.scores]
    inside += [task.materials.teacher, task.materials.rows, task.materials.train_targets]
    benchmarks = Benchmarks((Task("arc_easy", "arc.jsonl"), Task("piqa")), 1, "teacher")
    inside += [Pool("tune").scratch, benchmarks.tokenizer, benchmarks.tasks[0].data]
    assert all(path.startswith(f"{tmp_path}/") for path in inside)
    assert task.materials.heldout_targets == "s3://bucket/heldout"
    assert benchmarks.tasks[1].data is None


@pytest.mark.parametrize("folder", ["", Path("trials")])
def test_a_path_that_is_empty_or_no_string_is_refused(made, folder):
    materials, origin, _ = made
    for wrong in ({"folder": folder}, {"materials": replace(materials, rows=folder)}):
        arguments = {"materials": materials, "origin": origin, "folder": "trials"} | wrong
        with pytest.raises(InputError, match=r"folder|materials\.rows"):
            SearchTask(config=DistillConfig(steps=2), losses=Losses(), **arguments)


def test_every_event_survives_the_conversion_for_ray_tune():
    for kind in get_args(Event):
        values = {"metrics": {"train_loss": 1.5, "brand_new": 2.0}, "reason": "r", "trace": "t", "node": "n"}
        event = kind(**{field.name: values.get(field.name, 3) for field in fields(kind)})
        assert from_tune({"pid": 1, "hostname": "h", **to_tune(event)}) == event
    assert from_tune({"pid": 1, "done": True}) is None


def test_a_new_field_of_a_step_report_is_a_metric():
    values = {field.name: 1.0 for field in fields(StepReport)} | {"kl": None, "seconds": {"forward": 0.5}}
    metrics = StepReport(**values).metrics()
    assert metrics.keys() == {
        "train_loss",
        "train_cross_entropy",
        "train_intermediate",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "flop_utilisation",
        "datasheet_flop_utilisation",
        "skipped_steps",
        "seconds_forward",
    }
    newer = make_dataclass("Newer", [("temperature", float, 2.0)], bases=(StepReport,), frozen=True)
    assert newer(**values).metrics() == metrics | {"temperature": 2.0}


def test_a_damaged_file_of_a_trial_is_named(tmp_path):
    folder = tmp_path / trial_folder("", BASE).strip("/")
    folder.mkdir()
    assert trial_result(str(tmp_path), BASE) is None
    for name in ("result.json", "undistilled.json", "rung-000004.json"):
        (folder / name).write_text('{"kl": 1}')
    for read in (trial_result, forward_score, lambda f, a: rung_result(f, a, 4)):
        with pytest.raises(MinitronError, match=r"\.json: not a trial's file") as raised:
            read(str(tmp_path), BASE)
        assert "delete the file" in raised.value.remedy


UNKNOWN_RAY = """
import sys, types, warnings
import ray.tune
name = "ray.air.execution._internal.actor_manager"
sys.modules[name] = types.ModuleType(name)  # as in a version of Ray in which the class has moved
import minitron_search.pool
from minitron_search.ray_patches import patch_oom_as_actor_error
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    patch_oom_as_actor_error()
print([str(warning.message) for warning in caught])
"""


def test_a_ray_version_without_the_private_class_is_warned_about_and_still_works():
    result = subprocess.run(
        [sys.executable, "-c", UNKNOWN_RAY], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "this version of Ray is not supported" in result.stdout


def test_a_private_ray_of_such_a_version_is_refused_as_tunes_own_actors_need_what_its_node_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.tune.execution.class_cache", types.ModuleType("class_cache"))
    with pytest.warns(RuntimeWarning, match="workers are restarted for every round"):
        keep_workers.__wrapped__()
    monkeypatch.setenv("MINITRON_PRIVATE_RAY", "1")
    with pytest.raises(MinitronError, match="this version of Ray is not supported"):
        keep_workers.__wrapped__()
