"""Selection of the units to keep: the highest-scored ones of each axis, in their original order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor

from minitron.architecture import Architecture
from minitron.arguments import check_type, check_types
from minitron.errors import InputError
from minitron.families.table import HEADS, HIDDEN, KV_HEADS, MLP
from minitron.importance.scores import ImportanceScores

HOW = ("contiguous", "scattered", "iterative")


@dataclass(frozen=True)
class Selection:
    """Indices of the kept units in the source model, int64, ascending. The lists have one tensor for each kept layer."""

    layers: list[int]
    hidden: Tensor = field(repr=False)
    """[kept channels], the same in every layer."""
    neurons: list[Tensor] = field(repr=False)
    """[kept neurons], or [kept experts, kept neurons] in a mixture of experts, whose experts keep different neurons."""
    heads: list[Tensor] = field(repr=False)
    """[kept query heads]"""
    kv_heads: list[Tensor] = field(repr=False)
    """[kept key-value heads]"""
    experts: list[Tensor] = field(default_factory=list, repr=False)
    """[kept experts]; an empty list for a dense model."""

    def kept(self, axis: str, layer: int, head_dim: int, expert: int | None = None) -> Tensor | None:
        """Kept positions, int64, along a dimension `axis` of a tensor of the `layer`-th kept layer (and its `expert`-th kept
        expert); None if all are kept."""
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
    """Choose the units of `base` to keep for `target`.

    layers: the layers to keep; by default the least important contiguous block is removed. Embedding channels are chosen
    once for the whole model; neurons, heads and experts for each layer, and neurons for each kept expert. Heads are ranked
    within their KV group, so that every group loses the same number; if KV groups are removed too, those with the lowest
    total score are removed completely (arXiv 2407.14679 section 2.2). Raises InputError if `target` does not fit inside
    `base`, if `layers` does not match both, and for arguments of the wrong type.
    """
    _check_scores(scores)
    check_type("base", base, Architecture)
    check_type("target", target, Architecture)
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
    """The `target` of `num_layers` layers to keep when the least important ones by `metric` are removed.

    how: "contiguous" removes the least important block (arXiv 2408.11796 section 3); "scattered" removes the least important
    single layers, wherever they are; "iterative" removes the first layers of a measured removal order, the finest whose
    steps add up to the number to remove (default metric: "loss"). Raises InputError if `how` is unknown or its scores were
    not measured, and for arguments of the wrong type.
    """
    _check_scores(scores)
    check_type("num_layers", num_layers, Integral)
    check_type("target", target, Integral)
    if not 1 <= target <= num_layers:
        raise InputError(
            f"target: {target} is not between 1 and the model's {num_layers} layers", "keep at least one layer"
        )
    if how not in HOW:
        raise InputError(f"how: {how!r} is not a way to choose layers", f"use one of {', '.join(HOW)}")
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


def _check_scores(scores: ImportanceScores) -> None:
    check_type("scores", scores, ImportanceScores, "ImportanceScores")


def _check_layers(layers: Sequence[int], base: Architecture, target: Architecture) -> None:
    check_types("layers", layers, int)
    if list(layers) != sorted(set(layers)) or any(not 0 <= index < base.num_layers for index in layers):
        raise InputError(
            f"layers: {list(layers)} are not distinct ascending indices below {base.num_layers}",
            "give the layers to keep, counted from 0, in order",
        )
    if len(layers) != target.num_layers:
        raise InputError(
            f"layers: {list(layers)} are {len(layers)} layers, but num_layers is {target.num_layers}",
            f"give {target.num_layers} layers, the number that the smaller model has",
        )


def _best(scores: Tensor, count: int) -> Tensor:
    # stable: the lower index wins among equal scores, so the choice is the same on every machine
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
        raise InputError("scores.experts: missing, but the model is a mixture of experts", "calibrate this model")
    return [_best(scores.experts[i], target.num_experts) for i in layers]
