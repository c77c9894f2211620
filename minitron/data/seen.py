"""A set of hashes, to find documents that occurred before."""

from __future__ import annotations

import numpy as np

from minitron.data.tokenising import HASH_BYTES

RECENT = 2**20  # hashes kept in a Python set, which takes six times the memory of an array


class SeenHashes:
    """Hashes of HASH_BYTES bytes; about as many bytes of memory for each as it has."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, f"S{HASH_BYTES}")
        self._recent: set[bytes] = set()

    def add(self, value: bytes) -> bool:
        """Add a hash. Returns whether it is new."""
        if value in self:
            return False
        self._recent.add(value)
        if len(self._recent) >= RECENT:
            both = np.concatenate([self._sorted, np.array(sorted(self._recent), self._sorted.dtype)])
            self._sorted = np.sort(both, kind="stable")  # merges the two sorted halves
            self._recent = set()
        return True

    def __contains__(self, value: bytes) -> bool:
        if value in self._recent:
            return True
        index = int(np.searchsorted(self._sorted, value))
        return index < len(self._sorted) and self._sorted[index] == value
