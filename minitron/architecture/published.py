"""The published Minitron models by name: the model each was pruned from, and the sizes that changed.

Shapes from arXiv 2407.14679 table 10 (Nemotron-4) and arXiv 2408.11796 tables 1 and 3 (Llama, Mistral NeMo).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

from minitron.architecture import Architecture
from minitron.arguments import check_type
from minitron.errors import InputError

# The sizes that identify a base model; flags and tying are not compared.
BASES: Mapping[str, Mapping[str, int | str]] = {
    "Llama 3.1 8B": {
        "family": "llama",
        "num_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
    },
    "Mistral NeMo 12B": {
        "family": "mistral",
        "num_layers": 40,
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 131_072,
    },
    "Nemotron-4 15B": {
        "family": "nemotron",
        "num_layers": 32,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_heads": 48,
        "num_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 256_000,
    },
    "Minitron 8B": {
        "family": "nemotron",
        "num_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_heads": 48,
        "num_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 256_000,
    },
}


@dataclass(frozen=True)
class Published:
    """One published model: the base models it may start from (keys of BASES) and the sizes that change."""

    bases: tuple[str, ...]
    changes: Mapping[str, int]


PUBLISHED = {
    "llama-3.1-minitron-4b-width": Published(("Llama 3.1 8B",), {"hidden_size": 3072, "intermediate_size": 9216}),
    "llama-3.1-minitron-4b-depth": Published(("Llama 3.1 8B",), {"num_layers": 16}),
    "mn-minitron-8b": Published(("Mistral NeMo 12B",), {"hidden_size": 4096, "intermediate_size": 11520}),
    "minitron-8b": Published(("Nemotron-4 15B",), {"hidden_size": 4096, "intermediate_size": 16384}),
    # 15B to 8B to 4B scored 4.6 points more MMLU than 15B to 4B in one step (arXiv 2407.14679 table 14)
    "minitron-4b": Published(
        ("Minitron 8B", "Nemotron-4 15B"), {"hidden_size": 3072, "intermediate_size": 9216, "num_heads": 24}
    ),
}


def published(name: str, base: Architecture) -> Architecture:
    """The architecture of the published model `name` (a key of PUBLISHED), pruned from `base`.

    Raises InputError if there is no such model, or if `base` does not have the shape that it was pruned from.
    """
    check_type("name", name, str)
    check_type("base", base, Architecture)
    if name not in PUBLISHED:
        close = get_close_matches(name, PUBLISHED, n=1, cutoff=0.4)
        raise InputError(
            f"{name!r} is not a published Minitron model",
            (f"did you mean {close[0]}? " if close else "") + f"Known: {', '.join(PUBLISHED)}",
        )
    recipe = PUBLISHED[name]
    differences = [_differences(BASES[known], base) for known in recipe.bases]
    if all(differences):
        nearest, differing = min(zip(recipe.bases, differences, strict=True), key=lambda pair: len(pair[1]))
        raise InputError(
            f"{name} is pruned from {' or '.join(recipe.bases)}; this model differs from {nearest} in {', '.join(differing)}",
            "give that model, or sizes of your own",
        )
    return replace(base, **recipe.changes)  # type: ignore[arg-type]


def _differences(expected: Mapping[str, int | str], base: Architecture) -> list[str]:
    return [
        f"{field} ({getattr(base, field)} instead of {value})"
        for field, value in expected.items()
        if getattr(base, field) != value
    ]
