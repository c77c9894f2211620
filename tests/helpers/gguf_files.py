"""GGUF files of tiny models, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from helpers import tiny

NAMES = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe", "mistral": "llama"}  # llama.cpp's, where they differ
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "nemotron", "gemma2", "gemma3_text", "phi3", "qwen3_moe")
# What transformers does not read from a GGUF file has transformers' default, that is None here.
COMMON: dict[str, Any] = {
    **dict.fromkeys(("sliding_window_pattern", "query_pre_attn_scalar", "rope_parameters")),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping")),
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"attention_bias": False, "mlp_bias": False},
}
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 128},
    "gemma2": {"sliding_window": None},
    "gemma3_text": {"sliding_window": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "intermediate_size": 768},
}
Tensors = dict[str, np.ndarray]


def model(family: str, tied: bool = True, **changes: Any) -> torch.nn.Module:
    """A random model of which the header of a GGUF file says everything."""
    return tiny.model(family, tied, **COMMON | OWN.get(family, {}) | changes)


def write(
    path: Path,
    made: torch.nn.Module,
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Write a model and the tokenizer of all tiny models. change: of the tensors. values: of the header, by key without the
    architecture; None leaves the key out."""
    config = made.config
    name = NAMES.get(config.model_type, config.model_type)
    header = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None) or config.norm_eps,
        "rope.freq_base": 10_000.0 if name != "gemma3" else 1_000_000.0,
        "vocab_size": config.vocab_size,
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attention.key_length": config.head_dim if name != "llama" else None,
        "rope.dimension_count": config.head_dim if name == "llama" else None,
        "expert_count": getattr(config, "num_experts", None),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        **(values or {}),
    }
    writer = gguf.GGUFWriter(path, name)
    for key, value in header.items():
        if isinstance(value, str):
            writer.add_string(f"{name}.{key}", value)
        elif value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{name}.{key}", value)
    _add_tokenizer(writer)
    for tensor, weights in change(tensors(made)).items():
        writer.add_tensor(tensor, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    words = tiny.tokenizer()
    tokens = words.convert_ids_to_tokens(range(len(words)))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))  # older versions of transformers read them for Gemma
    writer.add_token_types([3 if token == words.eos_token else 1 for token in tokens])
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(words.bos_token_id)
    writer.add_eos_token_id(words.eos_token_id)
    writer.add_pad_token_id(words.pad_token_id)


def tensors(made: torch.nn.Module) -> Tensors:
    """A model's weights by llama.cpp's names, changed as its converter changes them."""
    config = made.config
    name = NAMES.get(config.model_type, config.model_type)
    [kind] = [kind for kind, value in gguf.MODEL_ARCH_NAMES.items() if value == name]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    result: Tensors = {}
    for parameter, weights in made.named_parameters():
        values = weights.detach().float().numpy()
        if parameter.endswith("experts.gate_up_proj"):
            for half, part in zip(("gate_proj", "up_proj"), np.split(values, 2, axis=1), strict=True):
                result[names[parameter.replace("gate_up_proj", half)] + ".weight"] = np.ascontiguousarray(part)
            continue
        if parameter.endswith("experts.down_proj"):
            result[names[parameter] + ".weight"] = values
            continue
        stem, suffix = parameter.rsplit(".", 1)
        if name == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if name in ("gemma2", "gemma3", "nemotron") and stem.endswith("norm") and suffix == "weight":
            values = values + 1
        result[f"{names[stem]}.{suffix}"] = np.ascontiguousarray(values)
    return result
