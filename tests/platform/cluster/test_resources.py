"""Resources of trials and workers: a recipe's `auto` with and without GPUs, and explicit numbers."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import ray
import torch

from minitron import device
from minitron.errors import InputError
from minitron_platform import load_recipe, plan, run
from minitron_platform.cluster import hardware, ray_session, room
from minitron_platform.cluster.head_watch import HeadWatch
from minitron_platform.recipes.resources import resolve
from minitron_platform.stages import ray_start
from minitron_platform.stages.search import Search
from minitron_platform.stages.teacher import Teacher

AUTO = ("workers_per_trial", "gpus_per_trial", "workers", "gpus_per_worker")
ON_CPUS = (1, 0, 2, 0)  # the defaults of the keys before there was `auto`


def _resolved(resources):
    return tuple(asdict(resources)[name] for name in AUTO)


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes this process see GPUs that do not exist."""
    monkeypatch.setattr(device, "_cpu_has_bfloat16", lambda: True)  # as GPUs have it

    def see(count, gigabytes=80):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        found = SimpleNamespace(total_memory=int(gigabytes * 1e9))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: found)

    return see


# overrides of `resources`, number of GPUs, whether four trials fit on one, expected values in the order of AUTO
CASES = {
    "none": ({}, 0, False, ON_CPUS),
    "one": ({}, 1, True, (1, 0.25, 1, 1)),
    "one with little memory": ({}, 1, False, (1, 1, 1, 1)),
    "several": ({}, 3, True, (1, 0.25, 3, 1)),
    "more than rows in a step": ({}, 64, True, (1, 0.25, 4, 1)),
    "no GPU wanted": ({"gpus_per_trial": 0, "gpus_per_worker": 0}, 8, True, ON_CPUS),
    "none for the workers": ({"gpus_per_worker": 0}, 2, True, (1, 0.25, 2, 0)),
    "workers that would share one": ({"workers": 3}, 2, True, (1, 0.25, 3, 0)),
    "fewer workers": ({"workers": 1}, 2, True, (1, 0.25, 1, 1)),
    "two for each worker": ({"gpus_per_worker": 2}, 4, True, (1, 0.25, 2, 2)),
    "a part for each worker": ({"gpus_per_worker": 0.5}, 2, True, (1, 0.25, 1, 0.5)),
    "trials of several workers": ({"workers_per_trial": 2}, 2, True, (2, 1, 2, 1)),
    "trials of more workers than GPUs": ({"workers_per_trial": 2}, 1, True, (2, 0, 1, 1)),
    "a range for trials": ({"workers_per_trial": "{min: 2, max: 4}"}, 2, True, (4, 1, 2, 1)),
    "a range for trials of more workers than GPUs": ({"workers_per_trial": "{min: 3, max: 4}"}, 2, True, (4, 0, 2, 1)),
    "numbers": ({"gpus_per_trial": 1, "workers": 8, "gpus_per_worker": 1}, 0, False, (1, 1, 8, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_auto_resources_depend_on_the_gpus_and_explicit_ones_are_kept(case):
    given, there, small, expected = CASES[case]
    recipe = load_recipe("smollm2-135m-cpu", [f"resources.{key}={value}" for key, value in given.items()])
    assert _resolved(resolve(recipe, there, small_trials=small)) == expected


def test_every_worker_has_at_least_one_row_per_step():
    for training in ("distill", "family.0.distill", "correct.training"):
        whole = "{steps: 9, batch_rows: 1, peak_lr: 1.0e-3, min_lr: 1.0e-4, warmup_steps: 2}"
        recipe = load_recipe("smollm2-135m-cpu", [f"{training}={whole}"])
        assert [resolve(recipe, count).workers for count in (0, 1, 4)] == [1, 1, 1]


def test_a_plan_shows_and_uses_the_chosen_resources(bench, tmp_path, gpus):
    def planned(*overrides, address=None):
        recipe = load_recipe(str(bench / "recipe.yaml"), ["teacher.dtype=auto", *overrides])
        return plan(recipe, storage_path=str(tmp_path / "runs"), address=address)

    def what(found):
        return next(cost.estimate.what for cost in found.costs if cost.stage == "distill")

    gpus(0)
    on_cpus = planned()
    assert _resolved(on_cpus.resources) == ON_CPUS
    assert on_cpus.resources_text.startswith("no GPU: 2 workers with 1 CPU each, up to ")
    assert on_cpus.memory["tiny-student distill"].processes == 2
    assert "tokens on 2 workers" in what(on_cpus)
    gpus(1)
    assert planned().resources_text.startswith("1 GPU: 1 worker with 1 GPU, up to ")
    assert planned().resources_text.endswith(" with 0.25 GPU each")
    assert "tokens on 1 worker," in what(planned())
    assert planned().memory == {}  # the machine's memory, of which work on a GPU needs little
    gpus(1, gigabytes=6)
    assert planned().resources_text == "1 GPU: 1 worker with 1 GPU, up to 1 trial at once with 1 GPU"
    without = planned("resources.gpus_per_trial=0", "resources.gpus_per_worker=0")
    assert _resolved(without.resources) == ON_CPUS
    assert without.memory == on_cpus.memory
    assert without.bytes == on_cpus.bytes
    assert without.warnings == planned().warnings == []
    (warning,) = planned("resources.workers=2").warnings
    assert "resources.workers: 2 workers cannot share 1 GPU, so they train on CPUs; lower it to 1" in warning
    (warning,) = planned("teacher.dtype=float32").warnings
    assert warning.startswith("teacher.dtype: float32 on GPUs takes twice the memory of bfloat16")
    with pytest.raises(InputError, match="the recipe needs 2 GPUs and this machine has 1"):
        planned("resources.workers=2", "resources.gpus_per_worker=1")
    elsewhere = planned(address="127.0.0.1:6379")
    assert "reported once it is joined" in elsewhere.resources_text
    assert elsewhere.resources == on_cpus.resources


FRACTIONS = {
    "workers": (
        ["gpus_per_worker=0.5", "workers=2"],
        "resources.gpus_per_worker: 0.5 with resources.workers: 2, but NCCL",
        "use resources.gpus_per_worker=1, or resources.workers=1",
    ),
    "workers of a trial": (
        ["gpus_per_trial=0.25", "workers_per_trial=2"],
        "resources.gpus_per_trial: 0.25 with resources.workers_per_trial: 2, but NCCL",
        "use resources.gpus_per_trial=1, or resources.workers_per_trial=1",
    ),
    "more than a GPU": (["gpus_per_worker=1.5"], "resources.gpus_per_worker: 1.5 is not a whole number", "below 1"),
}


@pytest.mark.parametrize("case", FRACTIONS)
def test_processes_that_train_together_are_not_given_parts_of_a_gpu(bench, tmp_path, case):
    overrides, problem, remedy = FRACTIONS[case]
    recipe = load_recipe(str(bench / "recipe.yaml"), [f"resources.{override}" for override in overrides])
    with pytest.raises(InputError) as refused:
        plan(recipe, storage_path=str(tmp_path / "runs"), address="127.0.0.1:6379")  # wherever it runs
    assert refused.value.problem.startswith(problem)
    assert remedy in refused.value.remedy


def test_on_a_cluster_with_gpus_models_compute_in_bfloat16_whatever_the_head_nodes_cpu_has(
    bench, tmp_path, monkeypatch, capsys, empty_database
):
    node = {"CPU": 8.0, "GPU": 1.0}
    monkeypatch.setattr(device, "_cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(ray_session, "ray_session", lambda *_, **__: nullcontext())
    monkeypatch.setattr(ray_session, "head_address", lambda address: address)  # Ray would start itself
    monkeypatch.setattr(HeadWatch, "start", lambda self, address: None)
    monkeypatch.setattr(ray_start.RayStart, "computes_here", lambda self: True)  # there is no Ray
    monkeypatch.setattr(ray_start, "cluster_nodes", lambda: [node])
    monkeypatch.setattr(room, "cluster_nodes", lambda: [node])
    monkeypatch.setattr(hardware, "cluster_nodes", lambda: [node])
    monkeypatch.setattr(ray_start, "cluster_cpu_dtype", lambda: torch.float32)
    monkeypatch.setattr(room, "_cluster_gpu_bytes", lambda: 80_000_000_000)
    monkeypatch.setattr(ray_start, "present_nodes", lambda: [node])
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_database, tmp_path / "runs" / "mlflow.db")

    def dtype(*overrides):
        recipe = load_recipe(str(bench / "recipe.yaml"), ["teacher.dtype=auto", *overrides])
        storage = str(tmp_path / "runs")
        result = run(recipe, storage_path=storage, address="127.0.0.1:6379", until="teacher")
        return result.output(Teacher).dtype, " ".join(capsys.readouterr().out.split())

    chosen, shown = dtype()
    assert chosen == "bfloat16"
    assert "dtype: bfloat16, because the cluster's GPUs compute" in shown
    assert "teacher.dtype: float32 on GPUs" not in shown
    chosen, shown = dtype("teacher.dtype=float32")
    assert chosen == "float32"
    assert "teacher.dtype: float32 on GPUs takes twice the memory" in shown
    chosen, shown = dtype("resources.workers=2")
    assert "resources.workers: 2 workers cannot share 1 GPU, so they train on CPUs" in shown
    node["GPU"] = 0.0
    assert dtype()[0] == "float32"


def test_a_private_ray_starts_early_and_has_the_gpus_that_trials_and_workers_request(
    bench, tmp_path, gpus, monkeypatch
):
    gpus(1)
    started, init = [], ray.init
    monkeypatch.setattr(ray, "init", lambda **options: [started.append(time.time()), init(**options)][1])
    one = "family.0.space={num_layers: [4], hidden_size: [36], intermediate_size: [48, 72]}"
    recipe = load_recipe(str(bench / "recipe.yaml"), [one, "family.0.tolerance=0.5", "evaluate.tasks=[]"])
    done = run(
        recipe, storage_path=str(tmp_path / "runs"), until="search"
    )  # Ray refuses or waits for resources that do not exist
    assert _resolved(done.state.ensure_ray()) == (1, 0.25, 1, 1)
    (targets,) = (tmp_path / "runs" / "stages" / "targets").glob("*/stage.json")
    assert len(started) == 1
    assert started[0] < targets.stat().st_mtime  # during the stages before the search
    search = done.output(Search)
    assert len(search.ranking) == search.candidates == 2
    assert not search.failures
    parts = (tmp_path / "runs" / "runs").glob("*/spool/*.jsonl")
    records = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    (settings,) = (record["values"] for record in records if "gpu_memory_estimate" in record.get("values", {}))
    assert (settings["micro_batch_rows"], settings["teacher_kept"]) == ("2", "head")


LISTED = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-5b1c)
  MIG 3g.40gb     Device  0: (UUID: MIG-0a)
  MIG 1g.10gb+me  Device  1: (UUID: MIG-0b)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-77aa)
"""


@pytest.mark.parametrize(
    ("listed", "expected"), [(LISTED, 10 * 10**9), ("GPU 0: NVIDIA H100 80GB HBM3\n", 81559 << 20)]
)
def test_the_memory_of_a_part_of_a_gpu_is_that_of_the_part(tmp_path, monkeypatch, listed, expected):
    (tmp_path / "listed").write_text(listed)
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n[ $1 = -L ] && cat {tmp_path}/listed || printf '81559\\n81559\\n'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert room.node_gpu_bytes() == expected
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert room.node_gpu_bytes() == 0
