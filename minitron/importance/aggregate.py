"""Aggregation of activations over sequence and batch (arXiv 2407.14679 section 2.2): mean of |x|, L2 norm, or variance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitron.importance.distributed import sum_over_processes

AGGREGATIONS = ("mean", "l2", "var")


def over_sequence(values: Tensor, how: str) -> Tensor:
    """Aggregate [rows, seq_length, units] over the sequence: float32 [rows, units]."""
    values = values.float()
    if how == "mean":
        return values.abs().mean(dim=1)
    if how == "l2":
        return values.square().sum(dim=1).sqrt()
    return values.var(dim=1, correction=0)


class OverBatch:
    """Streaming aggregate over rows, for many modules at once: [*shape], whose last dimension is the units of one module.

    Sums are float64, so that neither the order of batches nor the number of processes matters.
    """

    def __init__(self, how: str, shape: tuple[int, ...], device: torch.device) -> None:
        self.how = how
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.total)

    def add(self, index: Any, rows: Tensor) -> None:
        """Add rows, float32 [n, units], of the module at `index` of the leading dimensions; rows not added count as zero."""
        rows = rows.double()
        self.total[index] += (rows.abs() if self.how == "mean" else rows).sum(dim=0)
        self.squares[index] += rows.square().sum(dim=0)

    def result(self, count: int) -> Tensor:
        """The aggregate over the `count` rows of all processes, float32 [*shape] on the CPU."""
        total = sum_over_processes(self.total)
        squares = sum_over_processes(self.squares)
        if self.how == "mean":
            value = total / count
        elif self.how == "l2":
            value = squares.sqrt()
        else:
            value = (squares / count - (total / count).square()).clamp(min=0)
        return value.float().cpu()
