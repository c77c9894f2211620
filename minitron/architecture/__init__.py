"""Shapes of decoders: their costs, shapes for a parameter budget, and published shapes."""

from minitron.architecture.architecture import (
    AXES,
    PRUNABLE,
    Architecture,
    PrunableAxis,
    axes_present,
    axes_that_differ,
)

__all__ = ["AXES", "PRUNABLE", "Architecture", "PrunableAxis", "axes_present", "axes_that_differ"]
