"""Aggregation of activations over sequence and batch (arXiv 2407.14679 section 2.2): mean of |x|, L2, or variance."""

from __future__ import annotations

import torch
from torch import Tensor

AGGREGATIONS = ("mean", "l2", "var")


def over_sequence(values: Tensor, how: str) -> Tensor:
    """[rows, seq_length, units] -> float32 [rows, units]."""
    values = values.float()
    if how == "mean":
        return values.abs().mean(dim=1)
    if how == "l2":
        return values.square().sum(dim=1).sqrt()
    return values.var(dim=1, correction=0)


class OverBatch:
    """Streaming aggregate of float32 rows [units], in float64 so that the order of batches does not matter."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.count = 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        """rows [n, units]"""
        rows = rows.double()
        self.count += rows.shape[0]
        self.total = self.total + (rows.abs() if self.how == "mean" else rows).sum(dim=0)
        self.squares = self.squares + rows.square().sum(dim=0)

    def result(self) -> Tensor:
        """float32 [units] on the CPU"""
        total, squares = torch.as_tensor(self.total), torch.as_tensor(self.squares)
        if self.how == "mean":
            value = total / self.count
        elif self.how == "l2":
            value = squares.sqrt()
        else:
            value = (squares / self.count - (total / self.count).square()).clamp(min=0)
        return value.float().cpu()
