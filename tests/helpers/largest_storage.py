"""The largest storage that operations within a block allocate, for tests of an upper limit."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestStorage(TorchDispatchMode):
    """The size in `bytes` of the largest storage, and `made_by`, the name of its operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.made_by = 0, ""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes() > self.bytes:
                self.bytes, self.made_by = leaf.untyped_storage().nbytes(), str(function)
        return result
