"""Structured pruning: which units stay, and cutting the smaller model out, in memory or file by file."""

from minitron.pruning.slicing import prune, sliced_tensors

__all__ = ["prune", "sliced_tensors"]
