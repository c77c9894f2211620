"""Bytes of main memory that tensors take while a block runs, counted, so that a test can give a budget."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WRAPPERS = (DTensor, AsyncCollectiveTensor)  # tensors around other tensors
NOT_MEMORY = (*WRAPPERS, FakeTensor)


class LiveBytes(TorchDispatchMode):
    """Counts storages that are made inside the block, until they are freed or, as FSDP2 does, resized."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, Any] = {}

    def begin_peak(self) -> None:
        self.peak = self.alive

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if any(issubclass(kind, WRAPPERS) for kind in types):
            return NotImplemented  # what is inside is counted
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            # fake ones are what DTensor finds out shapes with
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and not isinstance(tensor, NOT_MEMORY):
                self._count(tensor.untyped_storage())
        return result

    @contextmanager
    def counting(self) -> Iterator[LiveBytes]:
        resize = torch.UntypedStorage.resize_

        def resized(storage, size):
            resize(storage, size)
            self._count(storage)

        torch.UntypedStorage.resize_ = resized
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = resize

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._freed(key))
        size = storage.nbytes()
        self.alive += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.alive)

    def _freed(self, key: int) -> None:
        self._alive.pop(key, None)
        self.alive -= self._sizes.pop(key, 0)
