"""The agreement of two orders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

SETTLED = 0.9  # two orders with at least this tau count as the same


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-a: (pairs in the same order minus pairs in opposite order) / all pairs; NaN for fewer than two values."""
    pairs = [(a - b) * (c - d) for (a, c), (b, d) in combinations(zip(first, second, strict=True), 2)]
    return sum((product > 0) - (product < 0) for product in pairs) / len(pairs) if pairs else math.nan
