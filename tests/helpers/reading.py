"""A checkpoint that counts what is read from it."""

from __future__ import annotations


class Reading:
    """`weights` of a model on the meta device, and the number of `values` that were read of them."""

    def __init__(self, weights):
        self.weights, self.values = weights, 0

    def rows(self, name, start, stop):
        rows = self.weights.rows(name, start, stop)
        self.values += rows.numel()
        return rows
