"""The numbers of a decoder: what a shape costs, shapes for a budget, shapes that have been published."""

from minitron.architecture.architecture import PRUNABLE, Architecture

__all__ = ["PRUNABLE", "Architecture"]
