"""The estimate of GPU memory from shapes equals the bytes of a real step, which are counted on the meta device."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers.meta_step import architecture, count_split_step, count_step, like_cuda, meta_model
from helpers.tiny import FAMILIES, OWN
from torch.distributed.device_mesh import init_device_mesh

from minitron.architecture import Architecture
from minitron.distill import DistillConfig, sharding
from minitron.distill.fp8 import fp8_linears
from minitron.distill.gpu_memory import CONTEXT, gpu_memory

HEADS: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
# the family, then the sizes
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-8b": (
        "llama",
        {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, **HEADS},
    ),
    "llama-4.5b": (
        "llama",
        {"vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 32, **HEADS},
    ),
    "nemo-12b": (
        "mistral",
        {"vocab_size": 131_072, "hidden_size": 5120, "intermediate_size": 14_336, "num_hidden_layers": 40, **HEADS},
    ),
    "nemo-8b": (
        "mistral",
        {"vocab_size": 131_072, "hidden_size": 4096, "intermediate_size": 11_520, "num_hidden_layers": 40, **HEADS},
    ),
    "llama-70b": (
        "llama",
        {
            "vocab_size": 128_256,
            "hidden_size": 8192,
            "intermediate_size": 28_672,
            "num_hidden_layers": 80,
            **HEADS,
            "num_attention_heads": 64,
        },
    ),
    "llama-35b": (
        "llama",
        {
            "vocab_size": 128_256,
            "hidden_size": 6144,
            "intermediate_size": 18_432,
            "num_hidden_layers": 80,
            **HEADS,
            "num_attention_heads": 48,
        },
    ),
}


def named(name: str, layers: int, device: str = "meta") -> torch.nn.Module:
    """A model of full width with `layers` layers, which are enough because all are alike."""
    family, sizes = MODELS[name]
    return meta_model(family, device, sliding_window=None, **{**UNTIED, **sizes, "num_hidden_layers": layers})


def config(rows: int, recompute: str, batch_rows: int = 1152) -> DistillConfig:
    return DistillConfig(steps=1, batch_rows=batch_rows, micro_batch_rows=rows, activation_checkpointing=recompute)


@pytest.mark.parametrize(
    ("student", "teacher", "layers", "live", "rows", "recompute"),
    [
        ("llama-4.5b", "llama-8b", 32, False, 1, "full"),
        ("llama-4.5b", "llama-8b", 6, True, 4, "selective"),
        ("nemo-8b", "nemo-12b", 6, False, 4, "full"),
        ("nemo-8b", "nemo-12b", 6, True, 1, "none"),
        ("llama-35b", "llama-70b", 6, False, 1, "full"),
    ],
)
def test_the_estimate_for_a_published_size_equals_the_counted_bytes(student, teacher, layers, live, rows, recompute):
    settings = config(rows, recompute)
    with like_cuda():
        own, other = named(student, layers), named(teacher, layers)
        counted = count_step(own, other, settings, 8192, live=live)
    estimate = gpu_memory(
        architecture(own), settings, 8192, teacher=architecture(other), teacher_kept="whole" if live else "head"
    )
    assert estimate.step - CONTEXT == pytest.approx(max(counted.peaks.values()), rel=0.05)


SMALL = {**UNTIED, "vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1408, "sliding_window": None}
SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 6}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("fp8", ["tensorwise", "rowwise"])
def test_fp8_products_take_the_estimated_bytes(fp8, recompute):
    class Gpu:
        type = "cuda"  # else products would be emulated

    settings = replace(config(4, recompute, batch_rows=4), fp8=fp8)
    with like_cuda():
        model = meta_model("llama", **SMALL)
        with fp8_linears(model, fp8, Gpu(), with_gradients=True):
            counted = count_step(model, None, settings, 4096, micro_batches=1)
    estimate = gpu_memory(architecture(model), settings, 4096)
    assert estimate.step - CONTEXT == pytest.approx(max(counted.peaks.values()), rel=0.02)


def test_moments_of_8_bits_take_the_estimated_bytes(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    settings = replace(config(1, "none"), optimizer="adamw-8bit")
    with like_cuda():
        own, other = named("llama-4.5b", 4), named("llama-8b", 4)
        peaks = count_step(own, other, settings, 8192).peaks
    # without the optimizer's step, which is not compiled here and takes much more
    counted = max(peaks[part] for part in ("teacher", "student", "loss", "backward"))
    estimate = gpu_memory(architecture(own), settings, 8192, teacher=architecture(other))
    assert estimate.step - CONTEXT == pytest.approx(counted, rel=0.02)
    alone = gpu_memory(replace(architecture(own), num_layers=1), settings, 16)  # where the step is the peak
    assert alone.moments - 2 * alone.masters // 4 == pytest.approx(8 * 128_256 * 3072, rel=0.02)


@pytest.mark.parametrize(
    ("family", "recompute"),
    [
        *((family, "none") for family in FAMILIES),
        *((family, "selective") for family in ("llama", "nemotron", "phi3", "qwen3_moe")),
        *((family, "full") for family in ("llama", "nemotron", "gemma3_text", "mixtral")),
    ],
)
def test_the_estimated_activations_of_every_family_equal_the_counted_ones(family, recompute):
    sizes = {**UNTIED, **OWN.get(family, {}), "vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1408}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": None}
    if family == "gemma3_text":
        sizes["sliding_window"] = 4096
    if family == "qwen3_moe":
        sizes["moe_intermediate_size"] = 1408
    settings = config(4, recompute, batch_rows=4)
    with like_cuda():
        model = meta_model(family, num_hidden_layers=6, pad_token_id=0, eos_token_id=0, **sizes)
        counted = count_step(model, None, settings, 4096, micro_batches=1)
    estimate = gpu_memory(architecture(model), settings, 4096)
    assert estimate.step - CONTEXT == pytest.approx(max(counted.peaks.values()), rel=0.08)


def test_a_trial_needs_its_source_at_the_start_and_longer_only_if_it_is_kept():
    student = Architecture(4, 3072, 9216, 32, 8, 128, 128_256, tied=False)
    large = Architecture(32, 4096, 14_336, 32, 8, 128, 128_256, tied=False)
    settings = config(1, "full")
    alone = gpu_memory(student, settings, 512, teacher=large)
    cut, kept = (gpu_memory(student, settings, 512, teacher=large, source=large, source_kept=k) for k in (False, True))
    assert (cut.step, kept.step) == (alone.step, alone.step + 2 * large.num_parameters)
    assert cut.start == 2 * (large.num_parameters + student.num_parameters) + alone.teacher + CONTEXT
    assert cut.peak == max(cut.step, cut.start)
    split = replace(settings, shard=True)
    estimates = [gpu_memory(student, split, 512, teacher=large, source=s, processes=8) for s in (None, large)]
    assert estimates[0] == estimates[1]  # read from a file


def test_the_sums_that_cuda_graphs_add_to_count_from_the_first_micro_batch():
    """Without graphs they are made as the gradients come, when the loss's memory is free again."""
    student = Architecture(12, 576, 1536, 9, 3, 64, 49_152, tied=True)
    settings = DistillConfig(steps=1, batch_rows=4, micro_batch_rows=4)
    recorded, plain = (gpu_memory(student, replace(settings, cuda_graphs=on), 4096) for on in (True, False))
    assert (plain.gradients, recorded.gradients) == (0, 4 * student.num_parameters)


def test_gradients_move_to_their_sums_as_soon_as_they_are_there():
    with like_cuda():
        student = named("llama-4.5b", 6)
        peaks = count_step(student, None, config(1, "full"), 512).peaks
    parameters = sum(parameter.numel() for parameter in student.parameters())
    embedding = student.get_input_embeddings().weight.numel()
    # weights, masters, moments and sums take 18 bytes a parameter; all gradients in bfloat16 beside them would take 20
    assert peaks["backward"] < 18 * parameters + 2 * embedding + 0.5 * parameters


@pytest.mark.parametrize(
    ("student", "teacher", "layers", "live", "shape", "rows", "recompute"),
    [
        ("llama-4.5b", "llama-8b", 6, False, (8,), 1, "none"),
        ("nemo-8b", "nemo-12b", 4, False, (8,), 4, "full"),
        ("llama-35b", "llama-70b", 4, False, (32,), 1, "full"),
        ("nemo-8b", "nemo-12b", 3, True, (8,), 1, "selective"),
        ("llama-4.5b", "llama-8b", 3, True, (4, 8), 1, "none"),  # four nodes, each with a copy of both
    ],
)
def test_the_estimate_for_a_part_of_a_split_student_equals_the_counted_bytes(
    processes, monkeypatch, student, teacher, layers, live, shape, rows, recompute
):
    processes(math.prod(shape))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("nodes", "shards")[-len(shape) :])
    monkeypatch.setattr(sharding, "mesh_of", lambda device, size: mesh)
    settings = replace(config(rows, recompute), shard=True)
    with like_cuda():
        own, other = architecture(named(student, layers)), architecture(named(teacher, layers))
        made = [partial(named, name, layers, device="cpu") for name in (student, teacher)]
        peaks = count_split_step(*made, settings, 8192, live=live).peaks
    kept = "sharded" if live else "head"
    nodes = {"processes": math.prod(shape), "node_processes": shape[-1], "gpu_bytes": 80_000_000_000}
    estimate = gpu_memory(own, settings, 8192, teacher=other, teacher_kept=kept, **nodes)
    assert estimate.step - CONTEXT == pytest.approx(max(peaks.values()), rel=0.08)
    assert estimate.start - CONTEXT == pytest.approx(peaks["start"], rel=0.1)


def test_a_step_on_a_cpu_holds_the_bytes_that_are_counted_on_the_meta_device():
    sizes = {"vocab_size": 3000, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    peaks = []
    for device in ("meta", "cpu"):
        student, teacher = (meta_model("llama", device=device, attention="plain", **sizes, **UNTIED) for _ in range(2))
        peaks.append(count_step(student, teacher, config(2, "selective"), 256, live=True).peaks)
    assert peaks[0] == peaks[1]


def test_offloaded_and_sharded_tensors_are_not_counted():
    student = Architecture(32, 3072, 9216, 32, 8, 128, 128_256, tied=False)
    whole = gpu_memory(student, config(1, "full"), 8192)
    offloaded = gpu_memory(student, DistillConfig(1, micro_batch_rows=1, optimizer="adamw-offload"), 8192)
    assert (whole.masters, whole.moments) == (4 * student.num_parameters, 8 * student.num_parameters)
    assert (offloaded.masters, offloaded.moments) == (0, 0)
