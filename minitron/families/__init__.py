"""The model families that can be pruned, by transformers model type. The next one is a line here."""

from __future__ import annotations

from minitron.errors import InputError
from minitron.families.table import Family, Parameter, decoder

FAMILIES = {
    family.model_type: family
    for family in (
        decoder(
            "llama",
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            mlp_bias="mlp_bias",
            hidden_in_heads=True,
        ),
        decoder("mistral"),
        decoder("qwen2", qkv_bias=""),
        decoder("qwen3", qkv_bias="attention_bias", output_bias="attention_bias", qk_norm=True),
        decoder(
            "nemotron",
            gated=False,
            norm_bias=True,
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            mlp_bias="mlp_bias",
        ),
    )
}


def family_of(model_type: str) -> Family:
    """The table of a transformers model type. Raises InputError naming the supported ones."""
    if model_type not in FAMILIES:
        raise InputError(
            f"model type {model_type!r} has no family table",
            f"use one of {', '.join(FAMILIES)}, or add a table in minitron/families",
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Family", "Parameter", "decoder", "family_of"]
