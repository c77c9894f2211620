"""The model families that can be pruned, by transformers model type. A new one needs a file and a line here."""

from __future__ import annotations

from importlib import import_module

from minitron.errors import InputError
from minitron.families.decoder import decoder
from minitron.families.table import Family, Parameter

FAMILIES: dict[str, Family] = {
    model_type: import_module(f"minitron.families.{model_type}").FAMILY
    for model_type in (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "nemotron",
        "gemma2",
        "gemma3_text",
        "phi3",
        "mixtral",
        "qwen3_moe",
    )
}


def family_of(model_type: str) -> Family:
    """The family table of a transformers model type. Raises InputError naming the supported ones."""
    if model_type not in FAMILIES:
        raise InputError(
            f"model type {model_type!r} has no family table",
            f"use one of {', '.join(FAMILIES)}; docs/adding-a-family.md explains how to add one",
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Family", "Parameter", "decoder", "family_of"]
