"""What a GGUF file's header says of the computation is what the loaded model computes, or the file is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from helpers import gguf_files, tiny
from helpers.refusals import refused_alike

from minitron.errors import InputError
from minitron.models import check_contents, load_model, load_source, save_model, source_architecture

PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
    "attention_factor": 0.1 * math.log(4) + 1,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 512,
}
GLOBAL, LOCAL = {"rope_type": "default", "rope_theta": 1e6}, PLAIN  # of Gemma 3
HALF = {"partial_rotary_factor": 0.5}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tiny.rows()).logits


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": PLAIN | changes}


def linear(factor: float, **changes: Any) -> dict[str, Any]:
    return rope(rope_type="linear", factor=factor, **changes)


def gemma(full: dict[str, Any] = GLOBAL, sliding: dict[str, Any] = LOCAL) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


# family, what the model's config has, what the header says of it beside what the files of all families say
READ: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "length of a head": ("qwen2", {"head_dim": 24}, {}),
    "no heads as wide as the hidden size": ("llama", {"head_dim": 24}, {"attention.key_length": 24}),
    "part of a head rotates": ("phi3", rope(partial_rotary_factor=0.75), {}),
    "a whole head rotates": ("nemotron", rope(partial_rotary_factor=1.0), {"rope.dimension_count": 16}),
    "scale of the attention": ("gemma2", {"query_pre_attn_scalar": 64}, {"attention.scale": 0.125}),
    "no soft-capping": ("gemma3_text", {"final_logit_softcapping": None}, {"final_logit_softcapping": 0.0}),
    "no sliding window": ("phi3", {"sliding_window": None}, {"attention.sliding_window": 0}),
    "every third layer without a window": (
        "gemma3_text",
        {"sliding_window_pattern": 3, "num_hidden_layers": 4},
        {"attention.sliding_window_pattern": 3},
    ),
    "a window in no layer": (
        "gemma3_text",
        {"layer_types": ["full_attention"] * 2},
        {"attention.sliding_window": None, "attention.sliding_window_pattern": None},
    ),
    "base of the frequencies in windows": (
        "gemma3_text",
        gemma(sliding={**LOCAL, "rope_theta": 500.0}),
        {"rope.freq_base_swa": 500.0},
    ),
    "weights of experts that do not sum up to one": (
        "qwen3_moe",
        {"norm_topk_prob": False},
        {"expert_weights_norm": False},
    ),
    "epsilon of LayerNorm": ("nemotron", {"norm_eps": 0.5}, {"attention.layer_norm_rms_epsilon": None}),
    "linear scaling": (
        "llama",
        linear(4.0),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "linear scaling by an old key": ("qwen2", linear(2.0), {"rope.scale_linear": 2.0}),
    "linear scaling of half a head": (
        "nemotron",
        linear(4.0, **HALF),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "linear scaling outside of windows": (
        "gemma3_text",
        gemma(full=GLOBAL | {"rope_type": "linear", "factor": 8.0}),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "yarn": ("llama", {"rope_parameters": YARN}, YARN_KEYS),
    "yarn of as many tokens as the context": (
        "qwen3",
        {"rope_parameters": YARN | {"original_max_position_embeddings": 600}, "max_position_embeddings": 600},
        YARN_KEYS | {"rope.scaling.original_context_length": None},
    ),
    "yarn of half a head": ("nemotron", {"rope_parameters": YARN | HALF}, YARN_KEYS),
    "yarn outside of windows": ("gemma3_text", gemma(full=GLOBAL | YARN | {"rope_theta": 1e6}), YARN_KEYS),
    "yarn with other limits": (
        "qwen2",
        {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 2.0}},
        YARN_KEYS | {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0},
    ),
    "yarn without a factor of the attention": (
        "llama",
        {"rope_parameters": YARN | {"attention_factor": 1.0}},
        YARN_KEYS | {"rope.scaling.yarn_log_multiplier": 1.0},
    ),
    "yarn with a factor of the attention": (
        "llama",
        {"rope_parameters": YARN | {"attention_factor": 1.5 * YARN["attention_factor"]}},
        YARN_KEYS | {"rope.scaling.attn_factor": 1.5},
    ),
}


@pytest.mark.parametrize("case", READ)
def test_what_a_header_says_of_the_computation_is_computed_and_kept(case: str, tmp_path: Path) -> None:
    family, changes, values = READ[case]
    if family == "gemma3_text":
        changes = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]} | changes
        if "sliding_window_pattern" in changes:
            changes["layer_types"] = None
    path, model = tmp_path / "tiny.gguf", gguf_files.model(family, **changes)
    gguf_files.write(path, model, values=values)
    check_contents(str(path))
    loaded, tokenizer = load_source(str(path))
    torch.testing.assert_close(logits(loaded), logits(model))
    save_model(loaded, tokenizer, tmp_path / "saved")
    torch.testing.assert_close(logits(load_model(tmp_path / "saved")), logits(model))
    architecture, _ = source_architecture(str(path))
    assert architecture.head_dim == model.config.head_dim


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_gemma_s_largest_models_have_the_scale_of_attention_that_llama_cpp_knows(
    family: str, layers: int, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"head_dim": 24, "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2}
    for count, scalar in ((layers, 8), (2, 24)):
        path = tmp_path / f"{count}.gguf"
        model = gguf_files.model(family, num_hidden_layers=count, query_pre_attn_scalar=scalar, **changes)
        gguf_files.write(path, model)
        loaded = load_source(str(path))[0]
        assert loaded.config.query_pre_attn_scalar == scalar
        torch.testing.assert_close(logits(loaded), logits(model))


def test_a_file_that_transformers_does_not_load_because_of_the_model_s_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    gguf_files.write(path, gguf_files.model("mistral"), title="mistral")
    assert "takes it for a mistral model because of its general.name" in refused_alike(str(path)).problem


# family, what the header says, the text of the error
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a sliding window": ("llama", {"attention.sliding_window": 4096}, "llama.attention.sliding_window is 4096"),
    "a window in unknown layers": ("qwen2", {"attention.sliding_window": 5}, "qwen2.attention.sliding_window is 5"),
    "part of a head rotates": ("qwen3", {"rope.dimension_count": 8}, "qwen3.rope.dimension_count is 8"),
    "more than a head rotates": ("phi3", {"rope.dimension_count": 32}, "phi3.rope.dimension_count is 32"),
    "an odd part of a head rotates": ("phi3", {"rope.dimension_count": 7}, "phi3.rope.dimension_count is 7"),
    "values of another length": ("gemma2", {"attention.value_length": 8}, "gemma2.attention.value_length is 8"),
    "a scale of attention": ("llama", {"attention.scale": 0.5}, "llama.attention.scale is 0.5"),
    "a scale that is no root": ("gemma2", {"attention.scale": 0.3}, "gemma2.attention.scale is 0.3"),
    "negative scale": ("gemma2", {"attention.scale": -1.0}, "gemma2.attention.scale is -1.0"),
    "scaled logits": ("llama", {"logit_scale": 0.0625}, "llama.logit_scale is 0.0625"),
    "scaled embeddings": ("llama", {"embedding_scale": 12.0}, "llama.embedding_scale is 12.0"),
    "scaled residuals": ("llama", {"residual_scale": 0.25}, "llama.residual_scale is 0.25"),
    "soft-capped logits": ("qwen3", {"final_logit_softcapping": 30.0}, "qwen3.final_logit_softcapping is 30.0"),
    "soft-capped attention": ("gemma3_text", {"attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping is 50.0"),
    "not finite": ("gemma2", {"final_logit_softcapping": math.inf}, "gemma2.final_logit_softcapping is inf"),
    "text for a number": ("gemma2", {"final_logit_softcapping": "30"}, "final_logit_softcapping"),
    "clamped": ("llama", {"attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv is 8.0"),
    "not causal": ("qwen2", {"attention.causal": False}, "qwen2.attention.causal is 0"),
    "parallel residuals": ("llama", {"use_parallel_residual": True}, "llama.use_parallel_residual is 1"),
    "scaled experts": ("qwen3_moe", {"expert_weights_scale": 2.5}, "qwen3moe.expert_weights_scale is 2.5"),
    "sigmoid over experts": ("qwen3_moe", {"expert_gating_func": 2}, "qwen3moe.expert_gating_func is 2"),
    "a shared expert": ("qwen3_moe", {"expert_shared_count": 1}, "qwen3moe.expert_shared_count is 1"),
    "experts": ("llama", {"expert_used_count": 2}, "llama.expert_used_count is 2"),
    "other epsilon": ("llama", {"attention.layer_norm_epsilon": 0.5}, "llama.attention.layer_norm_epsilon is 0.5"),
    "another base in windows": ("gemma2", {"rope.freq_base_swa": 500.0}, "gemma2.rope.freq_base_swa is 500.0"),
    "sections of RoPE": (
        "qwen2",
        {"rope.dimension_sections": [4, 2, 2, 0]},
        "qwen2.rope.dimension_sections is [4, 2, 2, 0]",
    ),
    "windows of other layers": ("gemma2", {"attention.sliding_window_pattern": [True]}, "sliding_window_pattern is"),
    "an unknown key": ("llama", {"swiglu_clamp_exp": 7.0}, "llama.swiglu_clamp_exp, which is 7.0 in its header"),
    "yarn with beta_fast below beta_slow": (
        "llama",
        YARN_KEYS | {"rope.scaling.yarn_beta_fast": 1.0, "rope.scaling.yarn_beta_slow": 32.0},
        "scales RoPE (yarn, factor 4.0)",
    ),
    "yarn with no base": ("llama", YARN_KEYS | {"rope.freq_base": 1.0}, "scales RoPE (yarn, factor 4.0)"),
    "yarn of no tokens": (
        "llama",
        YARN_KEYS | {"rope.scaling.original_context_length": 0},
        "scales RoPE (yarn, factor 4.0)",
    ),
    "yarn of another factor of the attention": (
        "llama",
        YARN_KEYS | {"rope.scaling.yarn_attn_factor": 2.0},
        "llama.rope.scaling.yarn_attn_factor is 2.0",
    ),
    "yarn with less extrapolation": (
        "llama",
        YARN_KEYS | {"rope.scaling.yarn_ext_factor": 0.5},
        "llama.rope.scaling.yarn_ext_factor is 0.5",
    ),
    "scaled Phi-3": ("phi3", {"rope.scaling.factor": 4.0}, "scales RoPE (linear, factor 4.0)"),
    "Phi-3 by yarn": ("phi3", YARN_KEYS, "scales RoPE (yarn, factor 4.0)"),
    "longrope": (
        "llama",
        {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0},
        "llama.rope.scaling.factor is 4.0 in its header, but transformers' model computes with 1.0",
    ),
    "a factor of the attention alone": (
        "phi3",
        {"rope.scaling.attn_factor": 1.19},
        "phi3.rope.scaling.attn_factor is 1.19",
    ),
    "linear with a factor of the attention": (
        "llama",
        {"rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.5},
        "llama.rope.scaling.attn_factor is 1.5",
    ),
    "an unknown type": ("llama", {"rope.scaling.type": "su"}, "llama.rope.scaling.type is 'su'"),
    "alpha": ("llama", {"rope.scaling.alpha": 1000.0}, "llama.rope.scaling.alpha is 1000.0"),
    "negative factor": ("llama", {"rope.scaling.factor": -4.0}, "llama.rope.scaling.factor is -4.0"),
    "a text for a factor": (
        "llama",
        {"rope.scaling.factor": "4"},
        "llama.rope.scaling.factor is '4'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_header_that_says_what_the_model_would_not_compute_is_refused(case: str, tmp_path: Path) -> None:
    family, values, named = REFUSED[case]
    path = tmp_path / "tiny.gguf"
    gguf_files.write(path, gguf_files.model(family), values=values)
    error = refused_alike(str(path))
    assert named in error.problem
    assert str(path) in error.problem


HARMLESS: dict[str, tuple[str, dict[str, Any]]] = {
    "nothing is scaled": ("llama", {"logit_scale": 1.0, "embedding_scale": 0.0, "residual_scale": 1.0}),
    "the usual scale of attention": ("llama", {"attention.scale": 0.25, "attention.causal": True}),
    "no experts": ("llama", {"expert_count": 0, "expert_used_count": 0}),
    "one size for each layer": ("llama", {"attention.sliding_window": [0, 0]}),
    "of other uses": ("qwen3", {"pooling_type": 3, "classifier.output_labels": ["yes", "no"]}),
    "the layout": ("llama", {"tensor_data_layout": "Meta AI original pth", "rope.scaling.finetuned": True}),
    "the factor of yarn's attention": (
        "llama",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0},
    ),
    "longrope without factors": ("phi3", {"rope.scaling.type": "longrope"}),
    "a factor of 0, which is none": ("llama", {"rope.scaling.factor": 0.0}),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_keys_that_change_nothing_are_accepted(case: str, tmp_path: Path) -> None:
    family, values = HARMLESS[case]
    path, model = tmp_path / "tiny.gguf", gguf_files.model(family)
    gguf_files.write(path, model, values=values)
    check_contents(str(path))
    torch.testing.assert_close(logits(load_source(str(path))[0]), logits(model))


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    gguf_files.write(path, gguf_files.model("llama"), values={"logit_scale": 1.0, "logit_scalf": 1.0})
    path.write_bytes(path.read_bytes().replace(b"logit_scalf", b"logit_scale"))
    with pytest.raises(InputError, match=r"key 'llama\.logit_scale' twice"):
        check_contents(str(path))


def test_a_strange_value_of_every_other_key_of_a_decoder_is_refused(tmp_path: Path) -> None:
    of_scaling = ("original_context_length", "finetuned", "yarn_log_multiplier", "yarn_beta_fast", "yarn_beta_slow")
    accepted = {
        *("tensor_data_layout", "pooling_type", "attention.layer_norm_rms_epsilon", "rope.freq_base"),
        *("rope.scaling.factor", *(f"rope.scaling.{name}" for name in of_scaling)),
    }
    groups = (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
    keys = [key for group in groups for key in vars(group).values() if str(key).startswith("{arch}.")]
    path, model = tmp_path / "tiny.gguf", gguf_files.model("llama")
    for name in sorted(accepted | {key.removeprefix("{arch}.") for key in keys}):
        gguf_files.write(path, model, values={name: 3.5})
        if name in accepted:
            check_contents(str(path))
        else:
            with pytest.raises(InputError):
                check_contents(str(path))
