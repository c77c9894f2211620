"""Which units stay: the best-scored ones of each axis, in their original order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron.architecture import Architecture
from minitron.families.table import HEADS, HIDDEN, KV_HEADS, MLP
from minitron.importance.scores import ImportanceScores


@dataclass(frozen=True)
class Selection:
    """Kept indices of the source model, ascending.

    layers [L'] · hidden [D'] · and for each kept layer: neurons [F'], heads [H'], kv_heads [K'].
    """

    layers: list[int]
    hidden: Tensor
    neurons: list[Tensor]
    heads: list[Tensor]
    kv_heads: list[Tensor]

    def kept(self, axis: str, layer: int, head_dim: int) -> Tensor | None:
        """Kept positions along a tensor dimension of the `layer`-th kept layer; None where everything stays."""
        if axis == HIDDEN:
            return self.hidden
        if axis == MLP:
            return self.neurons[layer]
        if axis in (HEADS, KV_HEADS):
            units = self.heads[layer] if axis == HEADS else self.kv_heads[layer]
            return (units[:, None] * head_dim + torch.arange(head_dim)).flatten()
        return None


def select(scores: ImportanceScores, base: Architecture, target: Architecture) -> Selection:
    """Choose what stays of `base` for `target`. Raises InputError when `target` does not fit inside.

    Layers go as the contiguous block that matters least; embedding channels are chosen once for the whole model, neurons
    and heads layer by layer. Heads are ranked inside their KV group, so every group loses the same number; if KV groups
    go too, the groups with the least total score go whole (arXiv 2407.14679 section 2.2).
    """
    target.check_inside(base)
    layers = kept_layers(scores, base.num_layers, target.num_layers)
    groups = [_best(_group_totals(scores.heads[i], base), target.num_kv_heads) for i in layers]
    return Selection(
        layers=layers,
        hidden=_best(scores.channels, target.hidden_size),
        neurons=[_best(scores.neurons[i], target.intermediate_size) for i in layers],
        heads=[_heads(scores.heads[i], kept, base, target) for i, kept in zip(layers, groups, strict=True)],
        kv_heads=groups,
    )


def kept_layers(scores: ImportanceScores, num_layers: int, target: int) -> list[int]:
    """The layers that stay when the least important contiguous block goes."""
    removed = num_layers - target
    if removed == 0:
        return list(range(num_layers))
    start = int(scores.blocks(removed).argmin())
    return [index for index in range(num_layers) if not start <= index < start + removed]


def _best(scores: Tensor, count: int) -> Tensor:
    # stable: equal scores keep the lower index, so the choice is the same everywhere
    return torch.argsort(scores, descending=True, stable=True)[:count].sort().values


def _group_totals(heads: Tensor, base: Architecture) -> Tensor:
    return heads.view(base.num_kv_heads, -1).sum(dim=1)


def _heads(scores: Tensor, groups: Tensor, base: Architecture, target: Architecture) -> Tensor:
    in_group = base.num_heads // base.num_kv_heads
    keep = target.num_heads // target.num_kv_heads
    grouped = scores.view(base.num_kv_heads, in_group)
    return torch.cat([group * in_group + _best(grouped[group], keep) for group in groups.tolist()])
