"""Trainings on GPUs in a plan: what they take, the settings that follow from it, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers.command import minitron_here

from minitron.architecture import Architecture
from minitron.architecture.published import BASES
from minitron.distill import DistillConfig, Losses
from minitron.distill.fitting import CHOSEN, fitting
from minitron.errors import InputError
from minitron_platform import load_recipe, plan
from minitron_platform.estimates.gpu import correction_on_gpus, distillation_on_gpus, trials_on_gpus
from minitron_platform.recipes.build import distillation_losses, training_identity
from minitron_platform.recipes.candidates import family_candidates
from minitron_platform.recipes.resources import resolve
from minitron_platform.stages.finished import run_key

LLAMA, NEMOTRON = "llama-3.1-8b-to-4b-h100x8", "nemotron-15b-8b-4b-h100x8"
BASE = {LLAMA: "Llama 3.1 8B", NEMOTRON: "Nemotron-4 15B"}
VALUES = ("micro_batch_rows=4", "activation_checkpointing=none", "shard=false")
README = Path(__file__).parents[3] / "README.md"
AUTO = [f"search.training.{key}=auto" for key in ("micro_batch_rows", "activation_checkpointing", "shard")]


def trainings(name, overrides=()):
    """The trainings of a shipped recipe on GPUs of 80 GB, by what they are."""
    recipe = load_recipe(name, overrides)
    teacher, resources = Architecture(**BASES[BASE[name]], tied=False), resolve(recipe, 0)
    found = {"correct": correction_on_gpus(recipe, teacher, 2, resources)}
    for member in recipe.family:
        family = family_candidates(recipe, teacher)[member.model]
        largest = family.architectures[0]
        losses = distillation_losses(recipe, largest, teacher)[0]
        found[f"{member.model} search"] = trials_on_gpus(recipe, teacher, family.space.base, largest, 2, resources)
        found[f"{member.model} distill"] = distillation_on_gpus(recipe, member, teacher, largest, 2, resources, losses)
    return {what: training for what, training in found.items() if training}


@pytest.mark.parametrize("name", BASE)
def test_the_recipes_for_h100s_fit_on_them(name):
    for what, training in trainings(name).items():
        assert training.check(what).fits, what


def test_the_example_of_the_readme_fits_on_h100s():
    (line,) = re.findall(r"^resources: (\{.*\})", README.read_text(), re.MULTILINE)
    resources = [f"resources.{key}={value}" for key, value in yaml.safe_load(line).items()]
    for what, training in trainings(LLAMA, [*AUTO, *resources]).items():
        assert training.check(what).fits, what


def test_adapters_of_a_higher_rank_take_more_memory():
    """By the shapes of Llama 3.1 8B: a layer's matrices have 81,920 rows and columns together."""
    parameters, in_layers = 8_030_261_248, 32 * 81_920
    memory = {}
    for rank in (16, 128):
        training = "{steps: 100, batch_rows: 64, micro_batch_rows: 1, peak_lr: 1.0e-4, shard: false, compile: false}"
        changes = ["correct.method=lora", f"correct.lora_rank={rank}", f"correct.training={training}"]
        correction = trainings(LLAMA, changes)["correct"]
        assert round(correction.trained * parameters) == rank * in_layers
        fit = correction.fit()
        memory[rank] = fit.memory.masters + fit.memory.moments  # in float32
    assert memory[128] - memory[16] == pytest.approx(3 * 4 * 112 * in_layers, rel=1e-6)


def test_a_training_that_does_not_fit_is_refused_with_the_nearest_settings_that_do():
    alone = ["resources.workers_per_trial=1", "search.training.micro_batch_rows=4"]
    found = trainings(LLAMA, [*alone, "search.training.activation_checkpointing=none"])
    with pytest.raises(InputError) as refused:
        found["llama-3.1-4b-width search"].check("search of llama-3.1-4b-width")
    assert refused.value.problem.startswith("search of llama-3.1-4b-width: needs ")
    assert "activations 75.6" in refused.value.problem
    assert "search.training.micro_batch_rows=1 and search.training.optimizer=adamw-offload" in refused.value.remedy
    (changed,) = (
        training
        for what, training in trainings(
            LLAMA,
            [
                *alone,
                "search.training.activation_checkpointing=none",
                "search.training.micro_batch_rows=1",
                "search.training.optimizer=adamw-offload",
            ],
        ).items()
        if what == "llama-3.1-4b-width search"
    )
    assert changed.check("search").fits


def test_a_whole_student_with_an_offloaded_optimizer_that_does_not_fit_is_told_to_split_it():
    settings = ["micro_batch_rows=1", "activation_checkpointing=full", "shard=false", "optimizer=adamw-offload"]
    overrides = ["targets.mode=stored", "losses.hidden=[]", *(f"distill.{text}" for text in settings)]
    training = trainings(LLAMA, [*overrides, "resources.gpu_memory_bytes=20e9"])["llama-3.1-4b-width distill"]
    with pytest.raises(InputError) as refused:
        training.check("distill")
    assert refused.value.remedy.startswith("set distill.optimizer=adamw and distill.shard=true, which takes 1")


def test_one_gpu_distils_8b_into_4b_from_stored_targets():
    overrides = [
        "targets.mode=stored",
        "losses.hidden=[]",
        "resources.workers=1",
        "distill.shard=auto",
        "distill.micro_batch_rows=auto",
        "distill.activation_checkpointing=auto",
        "distill.optimizer=adamw-offload",
    ]
    fit = trainings(LLAMA, overrides)["llama-3.1-4b-width distill"].check("distill")
    assert fit.memory.peak < 0.9 * 80e9
    assert fit.config.shard is False


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes this process see one GPU of this size, which torch cannot compute on."""

    def see(gigabytes):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        found = SimpleNamespace(total_memory=int(gigabytes * 1e9))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: found)

    return see


def test_a_plan_goes_by_the_memory_of_the_gpu_that_is_there(bench, tmp_path, gpu):
    def planned(*overrides):
        auto = [f"{key}.micro_batch_rows=auto" for key in ("distill", "search.training")]
        return plan(load_recipe(str(bench / "recipe.yaml"), [*auto, *overrides]), storage_path=str(tmp_path / "runs"))

    gpu(80)
    roomy = planned().gpu_memory
    assert roomy.keys() == {"tiny-student search", "tiny-student distill"}
    assert roomy["tiny-student distill"].config.micro_batch_rows == 4  # all of the batch
    assert roomy["tiny-student distill"].config.activation_checkpointing == "none"
    gpu(1.5)
    with pytest.raises(InputError, match=r"tiny-student: needs 1\.5 GB: context 1\.5"):
        planned("resources.gpus_per_trial=1")
    larger = planned("resources.gpus_per_trial=1", "resources.gpu_memory_bytes=8e9")
    assert larger.gpu_memory.keys() == roomy.keys()


def test_a_plan_for_a_cluster_says_which_gpus_it_assumes(bench, tmp_path):
    options = ["--set", "resources.gpus_per_worker=1", "--set", "resources.gpus_per_trial=1"]
    told = minitron_here("plan", str(bench / "recipe.yaml"), *options, "--address", "127.0.0.1:6379", cwd=tmp_path)
    assert "of 80 GB each" in told.stdout
    assert re.search(r"each GPU distill: 1\.5 GB: context 1\.5.*; micro_batch_rows 2, activation", told.stdout)


def test_layers_are_compiled_on_gpus_in_trainings_that_are_long_enough_or_multiply_in_fp8():
    def compiled(*overrides):
        training = trainings(LLAMA, ["distill.compile=auto", "distill.warmup_steps=1", *overrides])
        fit = next(training for what, training in training.items() if what.endswith("distill")).fit()
        assert ("compile" in fit.settings) == fit.values["compile"] == fit.config.compile
        return fit.config.compile

    assert compiled("distill.steps=1000")
    assert not compiled("distill.steps=10", "distill.batch_rows=64")
    assert compiled("distill.steps=10", "distill.batch_rows=64", "distill.fp8=rowwise")
    assert not compiled("distill.steps=1000", "distill.compile=false")


def test_small_students_are_trained_with_cuda_graphs_where_they_can_be():
    small = Architecture(24, 576, 960, 9, 3, 64, 49_152, True)
    experts = replace(small, num_experts=8, experts_per_token=2, family="qwen3_moe")
    settings = DistillConfig(steps=40, batch_rows=16)

    def chosen(student=small, config=settings, **named):
        fit = fitting(student, config, 1024, 80_000_000_000, **named)
        assert ("cuda_graphs" in fit.settings) == fit.config.cuda_graphs
        return fit.config.cuda_graphs

    assert chosen()
    assert chosen(teacher=small, teacher_kept=("whole",))
    assert not chosen(replace(small, hidden_size=4608, intermediate_size=14_336))
    assert not chosen(experts)
    assert not chosen(teacher=experts, teacher_kept=("whole",))
    assert not chosen(teacher=small, teacher_kept=("sharded",), processes=2)
    assert not chosen(compared=1)
    assert not chosen(separate_documents=True)
    assert not chosen(trained=0.01)
    assert not chosen(replace(small, family="mistral"))
    assert not chosen(config=replace(settings, optimizer="adamw-offload"))
    assert not chosen(config=replace(settings, fp8="rowwise"))
    assert not chosen(config=replace(settings, shard=True), processes=2, chosen=("cuda_graphs",))
    assert not chosen(chosen=("compile",))


def test_cuda_graphs_are_left_out_where_documents_are_kept_apart():
    small = Architecture(24, 576, 960, 9, 3, 64, 49_152, True)

    def graphs(*overrides):
        recipe = load_recipe(LLAMA, ["distill.micro_batch_rows=1", "distill.cuda_graphs=auto", *overrides])
        member, resources = recipe.family[0], resolve(recipe, 0)
        training = distillation_on_gpus(recipe, member, small, small, 2, resources, Losses())
        return training.fit().config.cuda_graphs

    assert graphs("data.separate_documents=false")
    assert not graphs("data.separate_documents=auto")  # on GPUs they are kept apart


def test_what_is_left_to_the_memory_keeps_the_names_of_runs_and_stages(bench):
    def recipe(*overrides):
        return load_recipe(str(bench / "recipe.yaml"), overrides)

    said = [f"distill.{text}" for text in (*VALUES, "compile=false", "cuda_graphs=false")]
    free = [f"distill.{key}=auto" for key in CHOSEN]
    assert training_identity(recipe(*said).distill) == training_identity(recipe(*free).distill)
    assert "optimizer" not in training_identity(recipe().distill)
    assert run_key(recipe(*said)) == run_key(recipe(*free)) == run_key(recipe(*free, "distill.optimizer=adamw-offload"))
    assert run_key(recipe(*said)) != run_key(recipe(*said, "distill.shard=true"))
