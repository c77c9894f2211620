"""The largest storage that operations inside a block make, so that a test can say what must not exist."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestStorage(TorchDispatchMode):
    """`bytes` and `made_by`, the operator's name, of the largest storage."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.made_by = 0, ""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes() > self.bytes:
                self.bytes, self.made_by = leaf.untyped_storage().nbytes(), str(function)
        return result
