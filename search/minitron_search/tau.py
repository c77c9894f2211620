"""The agreement of two orders."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SETTLED = 0.9  # two orders with at least this tau count as the same


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-a: (pairs in the same order minus pairs in opposite order) / all pairs; NaN for fewer than two values."""
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != other.shape:
        raise ValueError(f"{one.size} and {other.size} values")
    if one.size < 2:
        return math.nan
    concordance = 0
    for index in range(one.size - 1):  # one at a time: the pairs of 10,000 candidates would take gigabytes
        products = np.sign(one[index] - one[index + 1 :]) * np.sign(other[index] - other[index + 1 :])
        concordance += int((products > 0).sum()) - int((products < 0).sum())
    return concordance / math.comb(one.size, 2)
