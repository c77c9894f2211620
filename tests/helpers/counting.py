"""Counts PyTorch's operations, such as those that send tensors to other processes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Counting(TorchDispatchMode):
    """Counts in `calls`, by name, what is called inside the block."""

    def __init__(self, calls: Counter[str] | None = None) -> None:
        super().__init__()
        self.calls = Counter[str]() if calls is None else calls

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        self.calls[str(function)] += 1
        return function(*arguments, **(named or {}))
