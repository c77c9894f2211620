"""The remedy of a refusal is enough: with the settings that it names, the plan passes or names more, or says that none is."""

from __future__ import annotations

import re

import pytest

from minitron.errors import InputError
from minitron_platform import load_recipe, plan

MOST = 8  # refusals that may follow each other
ALONE = ["resources.workers=1", "resources.workers_per_trial=1", "targets.mode=stored", "losses.hidden=[]"]
ON_CPUS = ["resources.workers=2", "distill.micro_batch_rows=4", "distill.checkpoint_every=0"]


def followed(planned, overrides, gpus):
    """The remedies that follow each other until a plan passes, and whether one does."""
    remedies = []
    while len(remedies) < MOST:
        try:
            planned(*overrides, gpus=gpus)
            return remedies, True
        except InputError as refused:
            remedies.append(refused.remedy)
        changes = re.findall(r"[a-z_0-9.]+=[a-z0-9-]+", remedies[-1])
        if not changes:
            return remedies, False
        if more := re.match(r"with (\d+) GPUs, set", remedies[-1]):
            gpus = int(more[1])
        assert not {*changes} <= {*overrides}, remedies
        overrides = [*overrides, *changes]
    raise AssertionError(remedies)


@pytest.mark.parametrize("correct", [[], ["correct=null"]], ids=["corrected", "as it is"])
@pytest.mark.parametrize("memory", [12, 16, 40])
@pytest.mark.parametrize("gpus", [1, 8])
def test_the_settings_that_a_refusal_for_gpus_names_are_enough(plan_large, gpus, memory, correct):
    own = ["resources.workers=auto", f"resources.workers_per_trial={gpus}", f"resources.gpu_memory_bytes={memory}e9"]
    remedies, passes = followed(plan_large, [*own, *correct], gpus)
    assert passes or not re.search("set ", remedies[-1])
    assert not any("--gpus says" in remedy for remedy in remedies)
    if (gpus, memory) == (8, 16):
        assert passes
        assert re.match(r"with \d+ GPUs, set resources\.workers", remedies[0])


def test_workers_that_the_cluster_has_gpus_for_are_offered_without_more(plan_large):
    few = ["resources.workers_per_trial=8", "resources.gpu_memory_bytes=16e9", "correct=null"]
    with pytest.raises(InputError, match=r"set resources\.workers_per_trial=16, which takes") as refused:
        plan_large(*few, gpus=64)
    assert refused.value.remedy.startswith("set ")


def test_workers_that_are_offered_have_all_their_gpus(plan_large):
    few = ["resources.workers=1", "resources.gpus_per_worker=2", "resources.workers_per_trial=4", "correct=null"]
    with pytest.raises(InputError, match=r"with 8 GPUs, set resources\.workers=4, which takes"):
        plan_large(*few, "resources.gpu_memory_bytes=40e9", gpus=4)


@pytest.mark.parametrize("memory", [60, 200])
def test_the_settings_that_a_refusal_for_main_memory_of_a_node_names_are_enough(plan_large, memory):
    overrides = ["correct=null", f"resources.node_memory_bytes={memory}e9"]
    for optimizer in ("adamw", "adamw-offload"):
        remedies, passes = followed(plan_large, [*overrides, f"distill.optimizer={optimizer}"], 8)
        assert passes or "use nodes with more main memory" in remedies[-1]


def test_an_optimizer_in_8_bits_is_offered_where_the_main_memory_is_too_small_for_an_offloaded_one(plan_large):
    overrides = [*ALONE, "correct=null", "distill.activation_checkpointing=full", "distill.micro_batch_rows=1"]
    remedies, passes = followed(plan_large, [*overrides, "resources.gpu_memory_bytes=80e9"], 1)
    assert passes
    assert "optimizer=adamw-offload" in " ".join(remedies)
    few = ["resources.gpu_memory_bytes=80e9", "resources.node_memory_bytes=60e9"]
    remedies, passes = followed(plan_large, [*overrides, *few], 1)
    assert passes
    assert "optimizer=adamw-8bit" in " ".join(remedies)
    assert "optimizer=adamw-offload" not in " ".join(remedies)


@pytest.mark.parametrize("own", [False, True], ids=["as the distillation", "own"])
@pytest.mark.parametrize("gigabytes", [2, 4])
def test_the_settings_that_a_refusal_for_main_memory_names_are_enough(bench, tmp_path, monkeypatch, gigabytes, own):
    monkeypatch.setattr("minitron_platform.planning.plan.machine_memory", lambda: gigabytes * 1_000_000_000)

    def planned(*overrides, gpus):
        assert gpus == 0
        recipe = load_recipe(str(bench / "recipe.yaml"), [*ON_CPUS, *overrides])
        return plan(recipe, storage_path=tmp_path / "planned")

    training = "{steps: 8, batch_rows: 32768, micro_batch_rows: 32768, peak_lr: 1.0e-4, min_lr: 0.0, warmup_steps: 2}"
    many = ["distill.batch_rows=32768", "distill.micro_batch_rows=32768", "data.train_rows=96"]
    correct = f"correct={{when: always, training: {training}}}" if own else "correct={when: measured}"
    remedies, passes = followed(planned, [*many, correct], 0)
    assert passes or remedies[-1].startswith("use a smaller teacher")
    assert remedies[0].startswith(("set correct.training" if own else "set distill.", "set resources.workers=1"))
    assert own or not any("correct.training" in remedy for remedy in remedies)
