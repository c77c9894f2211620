"""Aggregation of activations over sequence and batch (arXiv 2407.14679 section 2.2): mean of |x|, L2, or variance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitron.importance.distributed import add_up

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
    """Streaming aggregate over rows, of many places at once: [*shape], the last dimension the units of one place.

    In float64, so that neither the order of batches nor the number of processes matters.
    """

    def __init__(self, how: str, shape: tuple[int, ...], device: torch.device) -> None:
        self.how = how
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.total)

    def add(self, place: Any, rows: Tensor) -> None:
        """rows float32 [n, units], of the place at index `place`; a place that is left out for a row counts as zero."""
        rows = rows.double()
        self.total[place] += (rows.abs() if self.how == "mean" else rows).sum(dim=0)
        self.squares[place] += rows.square().sum(dim=0)

    def result(self, count: int) -> Tensor:
        """float32 [*shape] on the CPU, over the `count` rows of all processes."""
        total, squares = add_up(self.total), add_up(self.squares)
        if self.how == "mean":
            value = total / count
        elif self.how == "l2":
            value = squares.sqrt()
        else:
            value = (squares / count - (total / count).square()).clamp(min=0)
        return value.float().cpu()
