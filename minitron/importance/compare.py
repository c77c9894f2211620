"""Measures of how concentrated importance scores are, and of how well two calibrations agree.

If the scores of a model rank its units as those of the same model after some more training, they need not be computed again,
for example before and after teacher correction (arXiv 2408.11796 section 2.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron.errors import InputError
from minitron.importance.scores import ImportanceScores


def axes(scores: ImportanceScores) -> dict[str, Tensor]:
    """Scores of each axis by name, [groups, units]. Units compete within a group: a layer, an expert of a layer or, for
    channels, the whole model."""
    named = {
        "heads": scores.heads,
        "neurons": scores.neurons.flatten(0, -2),
        "channels": scores.channels[None],
    }
    return named if scores.experts is None else {**named, "experts": scores.experts}


def top_half_share(values: Tensor) -> Tensor:
    """Share of the total score of the higher-scored half of the units, 0.5 to 1: [..., units] -> float32 [...]."""
    half = values.topk((values.shape[-1] + 1) // 2, dim=-1).values.sum(dim=-1)
    return half / values.sum(dim=-1)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two [units]; equal values share their mean rank. NaN if one is constant."""
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def kept_overlap(a: Tensor, b: Tensor) -> float:
    """Share of the higher-scored half of [units] that both have in common, 0 to 1."""
    keep = (len(a) + 1) // 2
    best = [set(torch.argsort(values, descending=True, stable=True)[:keep].tolist()) for values in (a, b)]
    return len(best[0] & best[1]) / keep


def check_comparable(a: ImportanceScores, b: ImportanceScores) -> None:
    """Raise InputError unless both are scores of models of the same shape."""
    shapes = [{name: list(values.shape) for name, values in axes(scores).items()} for scores in (a, b)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"scores of models of two shapes: {shapes[0]} and {shapes[1]}",
            "compare calibrations of the same architecture",
        )
