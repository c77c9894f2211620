"""A plan for GPUs of a model goes by the memory and the speed in its data sheet."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.command import minitron_here

from minitron.device import datasheet
from minitron.errors import InputError
from minitron_platform import load_recipe, plan
from minitron_platform.cluster.nodes_at import ClusterNodes
from minitron_platform.planning.cluster import assumed_cluster

DISTILL = "llama-3.1-4b-width distill"
FIXED = [f"distill.{text}" for text in ("micro_batch_rows=2", "activation_checkpointing=none", "shard=true")]


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("L40S", 48),
        ("NVIDIA H200", 141),
        ("h100", 80),
        ("NVIDIA A100-SXM4-40GB", 40),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("nvidia gh200 480gb", 96),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("V100", None),
    ],
)
def test_the_memory_of_a_gpu_follows_from_its_name(name, gigabytes):
    sheet = datasheet(name)
    assert (sheet.memory / 1e9 if sheet else None) == gigabytes


def test_the_memory_of_the_planned_gpus_decides_what_fits_and_the_settings(plan_large):
    on_h100 = plan_large().gpu_memory[DISTILL]
    on_h200 = plan_large(gpu="H200").gpu_memory[DISTILL]
    on_l40s = plan_large(gpu="L40S").gpu_memory[DISTILL]
    assert on_l40s.memory.peak < 48e9 < on_h100.memory.peak < 80e9 < on_h200.memory.peak < 141e9
    assert on_l40s.config.activation_checkpointing != "none" == on_h100.config.activation_checkpointing
    assert on_h200.config.micro_batch_rows > on_h100.config.micro_batch_rows
    assert plan_large(*FIXED).gpu_memory[DISTILL].memory.peak > 48e9
    with pytest.raises(InputError, match=r"needs .* and there are 48\.0 GB"):
        plan_large(*FIXED, gpu="L40S")
    plan_large(*FIXED, "resources.gpu_memory_bytes=80e9", gpu="L40S")  # the recipe knows better


def test_the_command_says_which_memory_and_speed_it_assumes(bench):
    def told(*arguments):
        done = minitron_here("plan", "recipe.yaml", "--gpus", 4, "--storage", "planned", *arguments, cwd=bench)
        assert done.returncode == 0, done.stderr
        return re.sub(r"\s+", " ", done.stdout)

    assert "a GPU has 141 GB, by the data sheet of an H200" in told("--gpu", "nvidia h200")
    assert "a GPU has 20 GB, by resources.gpu_memory_bytes" in told("--set", "resources.gpu_memory_bytes=20e9")
    in_fp8 = told("--set", "distill.fp8=rowwise", "--set", "teacher.dtype=bfloat16")
    assert "distill.fp8: FP8 products are counted as long as those in bfloat16" in in_fp8


def test_float32_is_planned_at_the_speed_of_float32(bench, tmp_path):
    def planned(dtype):
        recipe = load_recipe(str(bench / "recipe.yaml"), [f"teacher.dtype={dtype}"])
        return plan(recipe, storage_path=tmp_path / "planned", cluster=assumed_cluster(4, utilisation=0.5)).cluster

    assert planned("bfloat16").gpu_flops == pytest.approx(0.5 * 989e12)
    in_float32 = planned("float32")
    assert in_float32.gpu_flops == pytest.approx(0.5 * 67e12)
    assert "50% of the 67 TFLOP/s in the data sheet of an H100 in float32" in in_float32.speed_text
    assert in_float32 == in_float32.computing_in(torch.float32)


def nodes(*kinds):
    found = [{"CPU": 64, "GPU": 8, f"accelerator_type:{kind}": 1} for kind in kinds]
    return ClusterNodes(found, found)


def test_the_gpus_of_a_cluster_that_answers_count_before_it_is_joined(bench, tmp_path, monkeypatch):
    def planned(*kinds):
        monkeypatch.setattr("minitron_platform.planning.machines._nodes_of", lambda address: nodes(*kinds))
        recipe = load_recipe(str(bench / "recipe.yaml"))
        found = plan(recipe, storage_path=tmp_path / "planned", address="10.0.0.1:6379")
        return found.resources.gpu_memory_bytes / 1e9, found.cluster.gpu

    assert planned("L40S") == (48, "L40S")
    assert planned("H200") == (141, "H200")
    assert planned("H200", "L40S") == (48, "L40S")  # the smaller of the two
    assert planned("H200", "Z9") == (80, "H100")  # not known
