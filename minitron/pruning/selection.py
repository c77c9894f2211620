"""Which units stay: the best-scored ones of each axis, in their original order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minitron.architecture import Architecture
from minitron.errors import InputError
from minitron.families.table import HEADS, HIDDEN, KV_HEADS, MLP
from minitron.importance.scores import ImportanceScores

HOW = ("contiguous", "scattered", "iterative")


@dataclass(frozen=True)
class Selection:
    """Kept indices of the source model, int64, ascending.

    layers [L'] · hidden [D'] · and for each kept layer: neurons [F'], heads [H'], kv_heads [K'] and, in a mixture of
    experts, experts [E'] and neurons [E', F'], each expert's own.
    """

    layers: list[int]
    hidden: Tensor
    neurons: list[Tensor]
    heads: list[Tensor]
    kv_heads: list[Tensor]
    experts: list[Tensor] = field(default_factory=list)

    def kept(self, axis: str, layer: int, head_dim: int, expert: int | None = None) -> Tensor | None:
        """Kept positions along a dimension of the `layer`-th kept layer's tensors, or of its `expert`-th kept expert's;
        None where everything stays."""
        if axis == HIDDEN:
            return self.hidden
        if axis == MLP:
            return self.neurons[layer] if expert is None else self.neurons[layer][expert]
        if axis in (HEADS, KV_HEADS):
            units = self.heads[layer] if axis == HEADS else self.kv_heads[layer]
            return (units[:, None] * head_dim + torch.arange(head_dim)).flatten()
        return None


def select(
    scores: ImportanceScores, base: Architecture, target: Architecture, *, layers: Sequence[int] | None = None
) -> Selection:
    """Choose what stays of `base` for `target`.

    `layers` are the layers that stay; by default the contiguous block that matters least goes. Embedding channels are
    chosen once for the whole model, neurons, heads and experts layer by layer, an expert's neurons inside it. Heads are
    ranked inside their KV group, so every group loses the same number; if KV groups go too, the groups with the least
    total score go whole (arXiv 2407.14679 section 2.2). Raises InputError when `target` does not fit inside `base`, or
    `layers` not both.
    """
    target.check_inside(base)
    if layers is None:
        layers = kept_layers(scores, base.num_layers, target.num_layers)
    else:
        _check_layers(layers, base, target)
    groups = [_best(_group_totals(scores.heads[i], base), target.num_kv_heads) for i in layers]
    experts = _experts(scores, layers, base, target)
    return Selection(
        layers=list(layers),
        hidden=_best(scores.channels, target.hidden_size),
        neurons=[
            _best(scores.neurons[i][experts[new]] if experts else scores.neurons[i], target.intermediate_size)
            for new, i in enumerate(layers)
        ],
        heads=[_heads(scores.heads[i], kept, base, target) for i, kept in zip(layers, groups, strict=True)],
        kv_heads=groups,
        experts=experts,
    )


def kept_layers(
    scores: ImportanceScores, num_layers: int, target: int, *, how: str = "contiguous", metric: str | None = None
) -> list[int]:
    """The `target` of `num_layers` layers that stay when the least important ones by `metric` go.

    contiguous: the block that matters least goes (arXiv 2408.11796 section 3). scattered: the single layers that matter
    least go, wherever they are. iterative: the first of the measured order of removal go, of the finest measured order
    whose steps add up to the number (metric: "loss" where none is named). Raises InputError where `how` is unknown or
    what it needs was not measured.
    """
    if how not in HOW:
        raise InputError(f"how: {how!r} is no way to choose layers", f"use one of {', '.join(HOW)}")
    count = num_layers - target
    if count == 0:
        return list(range(num_layers))
    if how == "iterative":
        removed = _first_removed(scores, count, metric or "loss")
    elif how == "scattered":
        removed = torch.argsort(scores.blocks(1, metric), stable=True)[:count].tolist()
    else:
        start = int(scores.blocks(count, metric).argmin())
        removed = list(range(start, start + count))
    return [index for index in range(num_layers) if index not in removed]


def _first_removed(scores: ImportanceScores, count: int, metric: str) -> list[int]:
    measured = scores.orders.get(metric, {})
    for step in sorted(measured):
        if count % step == 0 and count <= len(measured[step]):
            return measured[step][:count]
    orders = [
        f"{name}: {len(order)} by {step}" for name in scores.orders for step, order in scores.orders[name].items()
    ]
    raise InputError(
        f"layers: removing {count} iteratively by {metric!r} was not measured ({'; '.join(orders) or 'no order was'})",
        "calibrate with this metric and `iterative`, a number of layers at a time that divides the number to remove",
    )


def _check_layers(layers: Sequence[int], base: Architecture, target: Architecture) -> None:
    if list(layers) != sorted(set(layers)) or any(not 0 <= index < base.num_layers for index in layers):
        raise InputError(
            f"layers: {list(layers)} are not ascending, different indices below {base.num_layers}",
            "give the layers that stay, counted from 0, in order",
        )
    if len(layers) != target.num_layers:
        raise InputError(
            f"layers: {list(layers)} are {len(layers)} layers, not num_layers = {target.num_layers}",
            "give as many layers as the smaller model has",
        )


def _best(scores: Tensor, count: int) -> Tensor:
    # stable: equal scores keep the lower index, so the choice is the same everywhere
    return torch.argsort(scores, dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values


def _group_totals(heads: Tensor, base: Architecture) -> Tensor:
    return heads.view(base.num_kv_heads, -1).sum(dim=1)


def _heads(scores: Tensor, groups: Tensor, base: Architecture, target: Architecture) -> Tensor:
    in_group = base.num_heads // base.num_kv_heads
    keep = target.num_heads // target.num_kv_heads
    grouped = scores.view(base.num_kv_heads, in_group)
    return torch.cat([group * in_group + _best(grouped[group], keep) for group in groups.tolist()])


def _experts(scores: ImportanceScores, layers: Sequence[int], base: Architecture, target: Architecture) -> list[Tensor]:
    if not base.num_experts:
        return []
    if scores.experts is None:
        raise InputError(
            "scores.experts: there are none, but the model is a mixture of experts", "calibrate this model"
        )
    return [_best(scores.experts[i], target.num_experts) for i in layers]
