"""Values of transformers configs that the model itself reads."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any


def declared(config: Any, name: str) -> Any:
    """The value of a key of a transformers config; None if it has none, or if its class does not know the key.

    A config keeps every key of its file, also those that came with the weights from a model of another type, such as the
    sliding_window of a Mistral that was converted to Llama's names. The model ignores them.
    """
    known = _knows(type(config), name)  # type: ignore[arg-type]  # mypy takes no class for hashable
    return getattr(config, name, None) if known else None


@lru_cache  # each forward pass asks
def _knows(kind: type, name: str) -> bool:
    return hasattr(kind, name) or name in inspect.signature(kind).parameters
