"""Importance scores: how much each head, neuron, channel and layer matters."""

from minitron.importance.estimate import estimate_importance
from minitron.importance.scores import ImportanceScores

__all__ = ["ImportanceScores", "estimate_importance"]
