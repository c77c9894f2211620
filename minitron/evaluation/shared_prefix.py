"""The tokens with which all requests of a task begin, such as the examples before MMLU's questions, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from minitron.kv_cache import with_cache

LEAST_TOKENS = 32  # fewer are not worth a pass of their own


def shared_length(contexts: Sequence[tuple[int, ...]]) -> int:
    """Number of tokens with which all contexts begin; less than the shortest one has, and 0 if it is not worth a pass."""
    if len(contexts) < 2:
        return 0
    pairs = zip(min(contexts), max(contexts), strict=False)  # what these two begin with, all between them do
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    length = min(shared, min(map(len, contexts)) - 1)
    return length if length >= LEAST_TOKENS else 0


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of a prefix, of each layer two [1, heads, tokens, head_dim]."""

    layers: list[tuple[Tensor, Tensor]] = field(repr=False)

    @classmethod
    def computed(cls, decoder: Any, tokens: Sequence[int], device: torch.device) -> SharedPrefix:
        """Those of `tokens`, all of which the layers keep, sliding windows or not."""
        cache = DynamicCache()
        decoder(input_ids=torch.tensor([list(tokens)], device=device), **with_cache(cache))
        return cls([(layer.keys, layer.values) for layer in cache.layers])

    def cache(self, rows: int) -> DynamicCache:
        """A new cache of `rows` sequences that begin with the prefix."""
        return DynamicCache([tuple(each.expand(rows, -1, -1, -1) for each in layer) for layer in self.layers])
