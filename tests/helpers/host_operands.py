"""Finds values that operations on a GPU would take from main memory: a copy of a few bytes, for which the host waits."""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# those that copy such a value; arithmetic passes a single one to its kernel
COPYING = {"where", "index", "index_put", "index_put_", "_index_put_impl_", "copy_", "cat", "stack"}


class HostOperands(TorchDispatchMode):
    """Counts, by operation and line of this package, what is copied from main memory to the device "meta" within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        devices = {leaf.device.type for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)}
        name = function.overloadpacket.__name__
        onto = str(named.get("device")) == "meta" and devices == {"cpu"}
        if (name == "_to_copy" and onto) or (name in COPYING and devices == {"cpu", "meta"}):
            lines = [frame for frame in traceback.extract_stack() if "/minitron/" in frame.filename]
            line = f"{lines[-1].filename.split('/minitron/')[-1]}: {lines[-1].line}" if lines else ""
            self.found[f"{name} in {line}"] += 1
        return function(*arguments, **named)
