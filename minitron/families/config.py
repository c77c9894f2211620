"""Conversion between a transformers config and the sizes of an `Architecture`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minitron.errors import InputError
from minitron.families import Family, family_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LONGROPE = (
    "longrope"  # flag of a model for which transformers derives the number of rotary factors from its hidden size
)

# names of the sizes in transformers' configs, unless the family's table has others
CONFIG_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}
EXPERT_NAMES = {"num_experts": "num_experts", "experts_per_token": "num_experts_per_tok"}


def read_config(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of an `Architecture`. Raises InputError for a model type without a family table, a multimodal wrapper around a
    text model, and config values that the family table cannot describe."""
    text = getattr(config, "text_config", None)
    if text is not None:
        raise InputError(
            f"model type {config.model_type!r} wraps the text model {_type_of(text)!r}; only text models can be pruned",
            "save its text model as a checkpoint of its own, as docs/adding-a-family.md shows, and give that",
        )
    family = family_of(config.model_type)
    for name, value in family.required.items():
        actual = getattr(config, name, None)
        if actual is not None and actual != value:
            raise InputError(
                f"{name}: {actual!r} is not supported in {family.model_type} models",
                f"use a model with {name} = {value!r}",
            )
    numbers = {field: getattr(config, name, None) for field, name in _names(family).items()}
    heads = numbers["num_heads"]
    head_dim = getattr(config, "head_dim", None)
    if not head_dim and config.hidden_size % heads:
        raise InputError(
            f"hidden_size: {config.hidden_size} is not a multiple of num_attention_heads = {heads}, and the config has no "
            "head_dim",
            "add head_dim to config.json, or correct the two",
        )
    flags = [flag for flag in family.flags if getattr(config, flag, False)]
    if family.longrope_in_hidden and (config.rope_parameters or {}).get("rope_type") == LONGROPE:
        flags.append(LONGROPE)
    return {
        **numbers,
        "num_kv_heads": numbers["num_kv_heads"] or heads,
        "head_dim": head_dim or config.hidden_size // heads,
        "vocab_size": config.vocab_size,
        "tied": bool(config.tie_word_embeddings),
        "family": config.model_type,
        "flags": tuple(flags),
    }


def _type_of(config: Any) -> Any:
    """The model type of a config inside another one, which is whatever config.json has in configs of unusual classes."""
    return config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)


def write_config(config: PretrainedConfig, family: Family, fields: Mapping[str, Any]) -> None:
    """Set the sizes of an `Architecture` in a config, including `head_dim`."""
    for field, name in _names(family).items():
        setattr(config, name, fields[field])
    config.head_dim = fields["head_dim"]


def make_plain(config: PretrainedConfig) -> None:
    """Remove from a config what does not apply to checkpoints that this package writes: custom code and classes, quantisation.
    The result can be loaded with transformers alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for name in ("auto_map", "quantization_config"):
        if hasattr(config, name):
            delattr(config, name)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]


def _names(family: Family) -> dict[str, str]:
    return {**CONFIG_NAMES, **(EXPERT_NAMES if family.experts else {}), **family.config_names}
