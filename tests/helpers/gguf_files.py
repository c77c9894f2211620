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
COMMON: dict[str, Any] = {
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"attention_bias": False, "mlp_bias": False},
}
# Sliding windows are shorter than the rows of `tiny.rows`; None is transformers' default.
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma3_text": {"attn_logit_softcapping": None},
    "phi3": {"sliding_window": 5},
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
    title: str = "tiny",
) -> None:
    """Write a model and the tokenizer of all tiny models. change: of the tensors. values: of the header, by key without the
    architecture; None leaves the key out. title: the model's name."""
    config = made.config
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    layers = getattr(config, "layer_types", None) if config.model_type.startswith("gemma") else None
    partial = rope.get("partial_rotary_factor", 1.0)
    name = NAMES.get(config.model_type, config.model_type)
    header = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None) or config.norm_eps,
        "attention.layer_norm_epsilon": getattr(config, "norm_eps", None),
        "rope.freq_base": rope["rope_theta"],
        "vocab_size": config.vocab_size,
        "attention.sliding_window": getattr(config, "sliding_window", None) if name != "llama" else None,
        "attention.sliding_window_pattern": layers and [kind == "sliding_attention" for kind in layers],
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "attention.key_length": config.head_dim if name != "llama" else None,
        "attention.value_length": config.head_dim if name != "llama" else None,
        "rope.dimension_count": int(partial * config.head_dim) if name == "llama" or partial != 1 else None,
        "expert_count": getattr(config, "num_experts", None),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        **(values or {}),
    }
    writer = gguf.GGUFWriter(path, name)
    writer.add_name(title)
    for key, value in header.items():
        if isinstance(value, str):
            writer.add_string(f"{name}.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"{name}.{key}", value)
        elif isinstance(value, bool):
            writer.add_bool(f"{name}.{key}", value)
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
