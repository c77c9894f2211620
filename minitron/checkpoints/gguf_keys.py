"""The table of the keys in a GGUF file's header that say what the model computes, and what in a config stands for them.

The keys: github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py. Which of them a converter writes for a family, and what
llama.cpp computes with them: conversion/ and src/models/ there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from minitron.checkpoints.gguf_header import Value
from minitron.checkpoints.gguf_rope import FULL, SLIDING, rope_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LARGE_GEMMA = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the models of 27B, by which llama.cpp knows that their attention has another scale."""


@dataclass(frozen=True)
class Key:
    """A key of the header.

    accepted: the values that say what the model of a config computes; the first one is named in errors. write: puts a value
    into the config, if transformers does not and the model has a setting for it. missing: the value that llama.cpp takes for a
    header without the key, where it is not that of transformers' config.
    """

    accepted: Callable[[PretrainedConfig], tuple[Value, ...]]
    write: Callable[[PretrainedConfig, Any], None] | None = None
    missing: Callable[[PretrainedConfig], Value] | None = None


def _setting(name: str) -> Key:
    """A key that transformers reads into this attribute of the config."""
    return Key(lambda config: (getattr(config, name, None) or 0,))


def _written(name: str) -> Key:
    """A key for which transformers' config has this attribute, None for 0."""
    return Key(
        lambda config: (getattr(config, name, None) or 0,), lambda config, value: setattr(config, name, value or None)
    )


def _fixed(*values: Value) -> Key:
    """A key with which the model computes in one way only."""
    return Key(lambda _: values)


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _write_head_dim(config: PretrainedConfig, value: int) -> None:
    if value != _head_dim(config):
        config.head_dim = value


def _rotary_dim(config: PretrainedConfig) -> int:
    return int(_head_dim(config) * rope_of(config).get("partial_rotary_factor", 1.0))


def _write_rotary_dim(config: PretrainedConfig, value: int) -> None:
    if value != _rotary_dim(config) and value <= _head_dim(config) and value % 2 == 0:
        config.rope_parameters = {**config.rope_parameters, "partial_rotary_factor": value / _head_dim(config)}


def _write_sliding_theta(config: PretrainedConfig, value: float) -> None:
    sliding = {**rope_of(config, SLIDING), "rope_theta": value}
    config.rope_parameters = {**config.rope_parameters, SLIDING: sliding}


def _attention_scale(config: PretrainedConfig) -> float:
    return float(getattr(config, "query_pre_attn_scalar", None) or _head_dim(config)) ** -0.5


def _write_attention_scale(config: PretrainedConfig, value: float) -> None:
    if value > 0:
        config.query_pre_attn_scalar = round(value**-2)


def _gemma_scale(config: PretrainedConfig) -> float:
    """llama.cpp's scale of Gemma's attention, which no key says."""
    large = config.num_hidden_layers == LARGE_GEMMA[config.model_type]
    return float(config.hidden_size // config.num_attention_heads if large else _head_dim(config)) ** -0.5


def _windows(config: PretrainedConfig) -> tuple[Value, ...]:
    window = config.sliding_window or 0
    return (window,) if SLIDING in config.layer_types else (window, 0)


def _write_window(config: PretrainedConfig, value: int) -> None:
    """Set the length of the sliding windows of a model in which some layers have one; 0 is none in all layers."""
    if value:
        config.sliding_window = value
    else:
        config.layer_types = [FULL] * config.num_hidden_layers


def _pattern(value: Value, layers: int) -> tuple[str | int | float, ...]:
    """Which layers have a sliding window: as the header says it for each layer, or all but every `value`th."""
    if isinstance(value, int):
        return tuple(int(value == 0 or layer % value < value - 1) for layer in range(layers))
    return value if isinstance(value, tuple) else ()


def _patterns(config: PretrainedConfig) -> tuple[Value, ...]:
    now = tuple(int(kind == SLIDING) for kind in config.layer_types)
    return now, *(period for period in range(len(now) + 1) if _pattern(period, len(now)) == now)


def _write_pattern(config: PretrainedConfig, value: Value) -> None:
    pattern = _pattern(value, config.num_hidden_layers)
    if len(pattern) == config.num_hidden_layers:
        config.layer_types = [SLIDING if slides else FULL for slides in pattern]


COMMON: Mapping[str, Key] = {
    "block_count": _setting("num_hidden_layers"),
    "context_length": _setting("max_position_embeddings"),
    "embedding_length": _setting("hidden_size"),
    "feed_forward_length": _setting("intermediate_size"),
    "vocab_size": _setting("vocab_size"),
    "attention.head_count": _setting("num_attention_heads"),
    "attention.head_count_kv": _setting("num_key_value_heads"),
    "attention.key_length": Key(lambda config: (_head_dim(config),), _write_head_dim),
    **dict.fromkeys(
        ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"),
        Key(lambda config: (_head_dim(config),)),
    ),
    "attention.layer_norm_rms_epsilon": _setting("rms_norm_eps"),
    "attention.layer_norm_epsilon": _setting("rms_norm_eps"),
    "attention.scale": Key(lambda config: (_attention_scale(config), 0)),
    "attention.causal": _fixed(1),
    "attention.sliding_window": _fixed(0),
    **dict.fromkeys(("rope.dimension_count", "rope.dimension_count_swa"), Key(lambda config: (_rotary_dim(config),))),
    "rope.dimension_sections": _fixed(0),
    **dict.fromkeys(("rope.freq_base", "rope.freq_base_swa"), Key(lambda config: (rope_of(config)["rope_theta"],))),
    **dict.fromkeys(("logit_scale", "embedding_scale", "residual_scale", "attention.output_scale"), _fixed(1, 0)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping"), _fixed(0)),
    **dict.fromkeys(("attention.temperature_length", "attention.temperature_scale"), _fixed(0)),
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", "attention.shared_kv_layers"), _fixed(0)),
    **dict.fromkeys(("use_parallel_residual", "leading_dense_block_count", "nextn_predict_layers"), _fixed(0)),
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_feed_forward_length"), _fixed(0)),
    **dict.fromkeys(("expert_shared_count", "expert_shared_feed_forward_length"), _fixed(0)),
    **dict.fromkeys(("expert_group_count", "expert_group_used_count", "expert_weights_scale"), _fixed(1, 0)),
    **dict.fromkeys(("moe_every_n_layers", "interleave_moe_layer_step"), _fixed(1, 0)),
}
"""Keys of every family: what its model computes with, in the order in which the config is completed."""

_PARTIAL_ROTARY = Key(lambda config: (_rotary_dim(config),), _write_rotary_dim)
_GEMMA = {
    "attention.scale": Key(lambda config: (_attention_scale(config),), _write_attention_scale, _gemma_scale),
    "final_logit_softcapping": _written("final_logit_softcapping"),
    "attention.sliding_window": Key(_windows, _write_window),
    "attention.sliding_window_pattern": Key(_patterns, _write_pattern),
}
OWN: Mapping[str, Mapping[str, Key]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {
        "expert_count": _setting("num_experts"),
        "expert_used_count": _setting("num_experts_per_tok"),
        "expert_feed_forward_length": _written("moe_intermediate_size"),
        "expert_weights_norm": Key(
            lambda config: (config.norm_topk_prob,),
            lambda config, value: setattr(config, "norm_topk_prob", bool(value)),
        ),
        "expert_gating_func": _fixed(1),  # softmax
    },
    "nemotron": {
        "attention.layer_norm_rms_epsilon": _setting("norm_eps"),
        "attention.layer_norm_epsilon": _written("norm_eps"),
        "rope.dimension_count": _PARTIAL_ROTARY,
    },
    "gemma2": _GEMMA | {"attn_logit_softcapping": _written("attn_logit_softcapping")},
    "gemma3_text": _GEMMA
    | {
        # without the key, transformers' model has windows and llama.cpp's has none
        "attention.sliding_window": replace(_GEMMA["attention.sliding_window"], missing=lambda _: 0),
        "rope.freq_base_swa": Key(lambda config: (rope_of(config, SLIDING)["rope_theta"],), _write_sliding_theta),
    },
    "phi3": {
        "attention.sliding_window": _written("sliding_window"),
        "rope.dimension_count": _PARTIAL_ROTARY,
    },
}
"""By transformers' model type, of the families that it reads from GGUF files: what differs from `COMMON`."""
