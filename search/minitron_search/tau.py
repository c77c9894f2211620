"""How much two orders agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

SETTLED = 0.9  # tau from which on two orders count as the same


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-a: pairs in the same order less pairs in opposite order, over all pairs; NaN for fewer than two."""
    pairs = [(a - b) * (c - d) for (a, c), (b, d) in combinations(zip(first, second, strict=True), 2)]
    return sum((product > 0) - (product < 0) for product in pairs) / len(pairs) if pairs else math.nan
