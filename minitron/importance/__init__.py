"""Importance scores: how much each head, neuron, channel, expert and layer matters."""

from minitron.importance.estimate import estimate_importance
from minitron.importance.layers import LayerScoring
from minitron.importance.scores import ImportanceScores

__all__ = ["ImportanceScores", "LayerScoring", "estimate_importance"]
