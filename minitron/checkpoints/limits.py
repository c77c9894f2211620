"""Limits of a model's config, checked before transformers builds anything from it, such as a list with an entry per layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minitron.arguments import short_repr
from minitron.errors import InputError

CONFIG_BYTES = 16 << 20  # of config.json; those of models with thousands of labels have less than one
MOST_LAYERS = 4096
MOST_EXPERTS = 4096
MOST_TENSORS = 500_000  # layers times experts
LARGEST_SIZE = 2**24  # of a matrix and of the vocabulary
LIMITS = {
    "num_labels": 100_000,
    "num_hidden_layers": MOST_LAYERS,
    "num_local_experts": MOST_EXPERTS,
    "num_experts": MOST_EXPERTS,
    "num_experts_per_tok": MOST_EXPERTS,
    "max_position_embeddings": 2**40,
    **dict.fromkeys(
        (
            *("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size", "head_dim"),
            *("num_attention_heads", "num_key_value_heads"),
        ),
        LARGEST_SIZE,
    ),
}
"""By key; in every section of a config."""
LARGEST = 2**63  # of any other number
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
REMEDY = "use the config.json that the checkpoint was saved with"


def check_limits(values: Any, where: str) -> None:
    """Raise InputError for sizes of a config that no model has, and for implementations that transformers would download.

    values: as read from config.json, before transformers uses them. where: the checkpoint's name in errors.
    """
    for key, value in _entries(values):
        limit = LIMITS.get(key, LARGEST)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > limit and key in LIMITS:
            raise InputError(f"{where}: config.json: {key}: {short_repr(value)} is more than {limit:,}", REMEDY)
        if isinstance(value, int) and abs(value) > limit:
            raise InputError(f"{where}: config.json: {key}: a number of {value.bit_length():,} bits", REMEDY)
        if key.strip("_").removesuffix("_internal") in IMPLEMENTATIONS and not _is_plain(value):
            raise InputError(
                f"{where}: config.json: {key}: {short_repr(value)} is code that transformers would download",
                "delete the key",
            )
    if isinstance(values, dict):
        layers, experts = (
            max((value for name in names if type(value := values.get(name)) is int), default=1)
            for names in (("num_hidden_layers",), ("num_local_experts", "num_experts"))
        )
        if layers * experts > MOST_TENSORS:
            raise InputError(
                f"{where}: config.json: {layers:,} layers of {experts:,} experts each are too many", REMEDY
            )


def _is_plain(value: Any) -> bool:
    """Whether an implementation is not the name of a repository, such as org/name."""
    if isinstance(value, dict | list):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, str) or value == "" or value.isidentifier()


def _entries(values: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of a JSON value, also of sections inside others. Not recursive: their depth is the file's choice."""
    pending = [("", values)]
    while pending:
        key, value = pending.pop()
        yield key, value
        if isinstance(value, dict):
            pending += [(str(name), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            pending += [(key, inner) for inner in value]
