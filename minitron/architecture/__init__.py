"""The numbers of a decoder: what a shape costs, shapes for a budget, shapes that have been published."""

from minitron.architecture.architecture import (
    AXES,
    PRUNABLE,
    Architecture,
    PrunableAxis,
    axes_present,
    axes_that_differ,
)

__all__ = ["AXES", "PRUNABLE", "Architecture", "PrunableAxis", "axes_present", "axes_that_differ"]
