"""Tensors that several processes share."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Any) -> TypeGuard[DTensor]:
    """Whether `tensor` is a DTensor. Does not import their module, which takes half a second: without it there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A DTensor gathered from all processes that share it, which call this together; any other tensor as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor
