"""The keys and values of earlier tokens, as transformers' models take and return them: their name depends on its version."""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import Any


@lru_cache
def cache_name() -> str:
    """Name of the argument and of the result: "cache" from transformers 5.24 on, which will not take the other one in 5.40."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    names = {field.name for field in fields(BaseModelOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"


def with_cache(cache: Any) -> dict[str, Any]:
    """Arguments of a model that continues the sequences of a transformers Cache and adds to it; None begins a new one."""
    return {"use_cache": True, cache_name(): cache}


def cache_of(output: Any) -> Any:
    """The Cache in a model's output."""
    return getattr(output, cache_name())
