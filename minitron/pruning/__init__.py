"""Structured pruning: choose the units to keep and build the smaller model, in memory or file by file."""

from minitron.pruning.slicing import prune, sliced_tensors

__all__ = ["prune", "sliced_tensors"]
