"""The architecture search on Ray Tune: enumerate candidates in a budget, distil each briefly, rank by held-out KL."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minitron_search.pool import Pool as Pool
    from minitron_search.space import candidates as candidates
    from minitron_search.tuning import search as search

_PUBLIC = {"Pool": "minitron_search.pool", "candidates": "minitron_search.space", "search": "minitron_search.tuning"}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'minitron_search' has no attribute {name!r}")
