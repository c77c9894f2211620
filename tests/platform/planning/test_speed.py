"""The speed of this machine: measured, kept in the user's cache folder, and used by `plan`."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from minitron_platform.cluster import room
from minitron_platform.doctor import measure_speed
from minitron_platform.estimates import speed as speeds
from minitron_platform.estimates.speed import Speed, speed_here, store_speed
from minitron_platform.planning.plan import plan
from minitron_platform.recipes.load import load_recipe


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a machine with four cores."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(speeds, "cores", lambda: 4)
    return tmp_path / "cache" / "minitron" / "speed.json"


def test_forward_passes_and_training_steps_are_measured(monkeypatch):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    monkeypatch.setattr(measure_speed, "SHAPE", small)
    monkeypatch.setattr(
        measure_speed, "HEADS", {**measure_speed.HEADS, "num_attention_heads": 4, "num_key_value_heads": 2}
    )
    threads = torch.get_num_threads()
    try:
        measured = measure_speed.measure(torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert 0 < measured["training"] < 1e13
    assert 0 < measured["forward"] < 1e13


def test_a_measured_speed_is_used_on_the_same_machine_alone(cache, monkeypatch):
    assumed = speed_here(torch.float32)
    assert (assumed.measured, assumed.forward) == ("", assumed.matmul * speeds.EFFICIENCY / 4)
    store_speed(torch.float32, Speed(3e9, 1e9, 8e9, "2026-11-26"))
    measured = speed_here(torch.float32)
    assert (measured.forward, measured.training, measured.measured) == (3e9, 1e9, "2026-11-26")
    assert [measured.of_stage(True, processes) for processes in (1, 2, 100)] == [1e9, 2e9, 4e9]
    assert measured.of_stage(False, 100) == 12e9
    assert speed_here(torch.bfloat16).measured == ""
    monkeypatch.setattr(speeds, "cores", lambda: 8)
    assert speed_here(torch.float32).measured == ""
    monkeypatch.setattr(speeds, "cores", lambda: 4)
    for damage in ("", "[]", json.dumps({"machine": {"forward": 1}})):
        cache.write_text(damage)
        assert speed_here(torch.float32) == replace(speed_here(torch.float32), measured="")


def test_a_plan_takes_as_long_as_the_measured_speed_says(bench, tmp_path):
    def seconds(stage, **speed):
        store_speed(
            torch.float32, Speed(**{"forward": 1e9, "training": 1e9, "matmul": 1e9, "measured": "today"} | speed)
        )
        recipe = load_recipe(bench / "recipe.yaml", ["resources.workers=2"])
        cost = next(cost for cost in plan(recipe, storage_path=tmp_path).costs if cost.stage == stage)
        return cost.seconds - cost.estimate.start_up_seconds, cost.estimate.flops

    took, flops = seconds("distill", training=1e6)
    assert took == pytest.approx(flops / 2e6)  # two workers with a core each
    took, flops = seconds("targets", forward=1e6)
    assert took == pytest.approx(flops / 4e6)  # one process on all cores


def test_a_search_computes_on_the_cores_of_the_trials_that_there_are_and_have_memory(bench, tmp_path, monkeypatch):
    for module in (speeds, room):
        monkeypatch.setattr(module, "cores", lambda: 64)
    store_speed(torch.float32, Speed(1e6, 1e6, 1e6, "today"))

    def search(*overrides):
        planned = plan(load_recipe(bench / "recipe.yaml", overrides), storage_path=tmp_path)
        cost = next(cost for cost in planned.costs if cost.stage == "search")
        cores = cost.estimate.flops / 1e6 / (cost.seconds - cost.estimate.start_up_seconds)
        return cores, len(planned.candidates["tiny-student"]), cost.estimate.memory.each.total

    cores, candidates, each = search()
    assert 1 < candidates < 64
    assert cores == pytest.approx(candidates)
    assert search("resources.cpus_per_trial=2")[0] == pytest.approx(2 * candidates)
    memory = (candidates - 1) * each + each // 2
    monkeypatch.setattr("minitron_platform.planning.plan.machine_memory", lambda: memory)
    assert search()[0] == pytest.approx(candidates - 1)


def test_a_teacher_that_runs_beside_the_student_has_its_head_counted_once(bench, tmp_path):
    recipe = load_recipe(bench / "recipe.yaml", ["targets.mode=online"])
    planned = plan(recipe, storage_path=tmp_path)
    (distill,) = (cost for cost in planned.costs if cost.stage == "distill")
    student, length = planned.candidates["tiny-student"][0], recipe.data.seq_length
    each = 3 * student.flops_per_token(length) + planned.teacher.flops_per_token(length)
    assert distill.estimate.flops == recipe.distill.steps * recipe.distill.batch_rows * length * each
