"""Parameter and FLOP counts are exact, for real transformers models and for the published ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import tiny
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
)

from minitron import Architecture
from minitron.errors import InputError
from minitron_search import candidates

NEMOTRON = {"vocab_size": 256_000, "head_dim": 128, "num_key_value_heads": 8, "tie_word_embeddings": False}
LLAMA = {"vocab_size": 128_256, "head_dim": 128, "num_key_value_heads": 8, "num_attention_heads": 32}
NEMO = {"vocab_size": 131_072, "head_dim": 128, "num_key_value_heads": 8, "num_attention_heads": 32}

# arXiv 2407.14679 table 10, arXiv 2408.11796 tables 1 and 3
PUBLISHED = {
    "Nemotron-4 15B": (NemotronConfig, NEMOTRON, (32, 48, 6144, 24576), 15_628_775_424),
    "Minitron 8B": (NemotronConfig, NEMOTRON, (32, 48, 4096, 16384), 8_271_699_968),
    "Minitron 4B": (NemotronConfig, NEMOTRON, (32, 24, 3072, 9216), 4_190_509_056),
    "Llama-3.1 8B": (LlamaConfig, LLAMA, (32, 32, 4096, 14336), 8_030_261_248),
    "Llama-3.1-Minitron 4B width": (LlamaConfig, LLAMA, (32, 32, 3072, 9216), 4_512_746_496),
    "Llama-3.1-Minitron 4B depth": (LlamaConfig, LLAMA, (16, 32, 4096, 14336), 4_540_469_248),
    "Mistral-NeMo 12B": (MistralConfig, NEMO, (40, 32, 5120, 14336), 12_247_782_400),
    "MN-Minitron 8B": (MistralConfig, NEMO, (40, 32, 4096, 11520), 8_414_105_600),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_published_models_are_exact(name):
    kind, settings, (layers, heads, hidden, mlp), expected = PUBLISHED[name]
    shape = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": hidden,
        "intermediate_size": mlp,
    }
    config = kind(**{**settings, **shape})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert Architecture.from_config(config).num_parameters == model.num_parameters() == expected


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe"])
def test_parameter_counts_of_full_size_models_are_exact(family):
    config = AutoConfig.for_model(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert Architecture.from_config(config).num_parameters == model.num_parameters()


@pytest.mark.parametrize("flags", [{}, {"attention_bias": False, "mlp_bias": False}], ids=["biases", "no biases"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parameter_counts_equal_those_of_transformers(family, tied, flags):
    model = tiny.model(family, tied, **flags)
    assert tiny.architecture(model).num_parameters == model.num_parameters()
    embeddings = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    assert tiny.architecture(model).num_non_embedding_parameters == model.num_parameters() - sum(embeddings.values())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_architecture_survives_a_transformers_config(family):
    base = tiny.architecture(tiny.model(family))
    experts = 3 if base.num_experts else 0
    smaller = replace(base, num_layers=2, hidden_size=32, intermediate_size=48, num_heads=4, num_experts=experts)
    config = smaller.to_config(tiny.config(family, True), kept_layers=[0, 4])
    assert Architecture.from_config(config) == smaller
    assert config.head_dim == base.head_dim
    assert Architecture.from_dict(smaller.to_dict()) == smaller


def test_flops_count_every_matrix_and_causal_attention():
    a = Architecture(2, 8, 16, 2, 1, 4, 100, True)
    per_layer = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16
    assert a.flops_per_token(10) == 2 * (2 * per_layer + 100 * 8) + 2 * 2 * 2 * 4 * 10
    assert a.kv_cache_bytes(10) == 2 * 2 * 1 * 4 * 10 * 2


def test_flops_count_only_the_experts_to_which_a_token_is_routed():
    a = Architecture(2, 8, 16, 2, 1, 4, 100, True, "mixtral", num_experts=8, experts_per_token=2)
    per_layer = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 8 * 8 + 2 * (3 * 8 * 16)  # attention, router, two experts
    assert a.flops_per_token(10) == 2 * (2 * per_layer + 100 * 8) + 2 * 2 * 2 * 4 * 10
    assert replace(a, num_experts=4).flops_per_token(10) == a.flops_per_token(10) - 2 * 2 * 4 * 8


# arXiv 2407.14679 table 19; the parameter budget is the one that gives its fifteen rows
TABLE_19 = {
    (32, 32, 12800, 5120), (32, 32, 13824, 4608), (32, 48, 11520, 4608), (32, 48, 16384, 4096), (31, 32, 12800, 5120),
    (31, 32, 16128, 4608), (31, 48, 13824, 4608), (31, 48, 16384, 4096), (30, 32, 12800, 5120), (30, 32, 16128, 4608),
    (30, 48, 13824, 4608), (30, 48, 16384, 4096), (29, 32, 12800, 5120), (29, 32, 16128, 4608), (29, 48, 13824, 4608),
}  # fmt: skip
BASE = Architecture(32, 6144, 24576, 48, 8, 128, 256_000, False, "nemotron")


def _space(heads, hidden):
    return {"num_layers": range(29, 33), "num_heads": heads, "mlp_ratio": [2.5, 3, 3.5, 4], "hidden_size": hidden}


def test_the_papers_8b_space_is_table_19():
    found = candidates(BASE, _space([32, 48], [4096, 4608, 5120, 5632, 6144]), 7.8e9, 8.5e9)
    assert {(a.num_layers, a.num_heads, a.intermediate_size, a.hidden_size) for a in found} == TABLE_19
    assert len(found) == 15


def test_the_papers_4b_space_has_18_candidates():
    found = candidates(BASE, _space([24, 32, 48], [2560, 3072, 3584, 4096, 4608]), 3.8e9, 4.2e9)
    assert len(found) == 18
    assert (32, 24, 9216, 3072) in {(a.num_layers, a.num_heads, a.intermediate_size, a.hidden_size) for a in found}
    assert all(3.8e9 <= a.num_parameters <= 4.2e9 for a in found)


@pytest.mark.parametrize(
    ("space", "named"),
    [
        ({"num_heads": [7]}, r"space.num_heads: 7 does not divide into 8 KV groups"),
        ({"hidden_size": [8192]}, r"space.hidden_size: 8192 is larger than the model's 6144"),
        ({"width": [3]}, "space.width: there is no such axis"),
        ({"num_layers": []}, "space.num_layers: the list is empty"),
        ({"num_layers": [2.5]}, "space.num_layers: 2.5"),
    ],
)
def test_an_invalid_space_is_refused(space, named):
    with pytest.raises(InputError, match=named):
        candidates(BASE, space, 0, 1e12)


def test_a_hidden_size_transformers_would_refuse_is_refused():
    llama = replace(BASE, family="llama")
    with pytest.raises(InputError, match="hidden_size: 4000 is not a multiple of 48 heads"):
        candidates(llama, {"hidden_size": [4000], "num_heads": [48]}, 0, 1e12)


def test_a_family_without_a_table_is_refused_by_name():
    with pytest.raises(InputError, match=r"'gpt2' has no family table[\s\S]*qwen3_moe; docs/adding-a-family.md"):
        Architecture.from_config(GPT2Config())


def test_a_wrapper_around_a_text_model_is_refused_by_name():
    with pytest.raises(InputError, match="'gemma3' wraps the text model 'gemma3_text'"):
        Architecture.from_config(Gemma3Config())


@pytest.mark.parametrize(
    ("family", "settings", "named"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers: \[1\] is not supported in qwen3_moe models"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step: 2 is not supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True is not supported"),
    ],
)
def test_a_model_that_the_family_table_does_not_describe_is_refused(family, settings, named):
    with pytest.raises(InputError, match=named):
        Architecture.from_config(tiny.config(family, True, **settings))


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("mixtral", {"num_experts": 1}, "num_experts: 1 is less than experts_per_token = 2"),
        ("mixtral", {"num_experts": 0}, "num_experts: 0 with experts_per_token = 2 does not describe a mixtral model"),
        ("llama", {"num_experts": 4, "experts_per_token": 2}, "num_experts: 4 .* does not describe a llama model"),
        ("gemma2", {"hidden_size": 42}, "hidden_size: 42 is not a multiple of num_heads = 8"),
    ],
)
def test_sizes_that_are_not_a_valid_model_are_refused(family, change, named):
    with pytest.raises(InputError, match=named):
        replace(tiny.architecture(tiny.model(family)), **change)
