"""AdamW with moments of 8 bits, by torchao: a byte for each value, and a scale for each block of 256 (arXiv 2110.02861)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from minitron.errors import InputError

MOMENT_BYTES = 1 + 4 / 256
"""Bytes per value of a moment: its code, and a share of the float32 scale of its block."""


def check_low_bit() -> None:
    """Raise InputError unless torchao is installed."""
    if importlib.util.find_spec("torchao") is None:
        raise InputError("optimizer: adamw-8bit needs the package torchao", "pip install 'minitron[fp8]', or use adamw")


def adamw_8bit(masters: Sequence[Tensor], betas: tuple[float, float], weight_decay: float) -> Optimizer:
    """The optimizer of these tensors, with a learning rate of 0 and moments that are 0.

    Tensors of fewer than 4,096 values, or whose number of values is not a multiple of 256, keep moments in float32.
    """
    check_low_bit()
    from torchao.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(list(masters), lr=0.0, betas=betas, weight_decay=weight_decay)
    for master in masters:  # a step without gradient or learning rate makes the moments and changes nothing
        master.grad = torch.zeros_like(master)
        optimizer.step()
        master.grad = None
        optimizer.state[master]["step"].zero_()
    return optimizer


def moment_parts(moment: Any) -> Iterator[tuple[str, Tensor]]:
    """(suffix of a name, tensor) of what a moment consists of, the tensors themselves: its codes, uint8, and its scales; or
    itself in float32."""
    if not hasattr(moment, "codes"):
        yield "", moment
        return
    yield ".codes", moment.codes
    yield ".scale", moment.scale
