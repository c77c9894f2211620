"""Iterative pruning: several steps, with importance estimated again before each (arXiv 2407.14679 table 12).

The paper found no gain over a single step after retraining (the final loss was 1.92 for 1, 2 and 4 steps), so this serves to
check that on another model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from minitron.architecture import PRUNABLE, Architecture
from minitron.arguments import check_model, check_type
from minitron.errors import InputError
from minitron.families.config import LONGROPE
from minitron.importance import LayerScoring, estimate_importance
from minitron.pruning.selection import kept_layers
from minitron.pruning.slicing import prune

EXPERT_WIDTHS = 8  # multiples of it are what transformers' grouped multiplication of experts accepts


def prune_in_steps(
    model: nn.Module,
    architecture: Architecture,
    rows: Tensor,
    *,
    steps: int,
    layers: LayerScoring | None = None,
    merge_heads: int = 0,
    **calibration: Any,
) -> nn.Module:
    """`model` pruned to `architecture` in `steps` equal steps; `model` itself is not changed.

    rows: packed tokens for `estimate_importance`, int64 [num_rows, seq_length]. calibration: its further arguments. layers:
    the metric by which every step chooses its contiguous block of layers to remove (default: cosine). merge_heads: as in
    `prune`. Raises InputError if `architecture` does not fit inside the model, if `steps` is not positive, and for
    arguments of the wrong type.
    """
    check_model("model", model)
    current = Architecture.from_config(model.config)
    for shape in shapes_between(current, architecture, steps):
        removed = current.num_layers - shape.num_layers
        scoring = replace(layers, sizes=(removed,)) if layers and removed else None
        scores = estimate_importance(model, rows, layers=scoring or (), **calibration)
        kept = kept_layers(scores, current.num_layers, shape.num_layers, metric=scoring.key if scoring else "cosine")
        model = prune(model, shape, scores, layers=kept, merge_heads=merge_heads)
        current = shape
    return model


def shapes_between(base: Architecture, target: Architecture, steps: int) -> Iterator[Architecture]:
    """The intermediate shapes: after step i of T every size is d_s - i · (d_s - d_t) / T, rounded to a valid shape.

    The last one is `target`; steps that change nothing are left out. Raises InputError as `prune_in_steps`.
    """
    check_type("base", base, Architecture)
    check_type("target", target, Architecture)
    check_type("steps", steps, Integral)
    if steps < 1:
        raise InputError(f"steps: {steps} is not positive", "use 1 for pruning in a single step")
    target.check_inside(base)
    current = base
    for step in range(1, steps + 1):
        shape = target if step == steps else _between(base, target, step / steps, current)
        if shape != current:
            yield shape
            current = shape


def _between(base: Architecture, target: Architecture, share: float, current: Architecture) -> Architecture:
    def part(before: int, after: int) -> int:
        return round(before - share * (before - after))

    sizes = {field: part(getattr(base, field), getattr(target, field)) for field in PRUNABLE}
    # whole KV groups with the same number of query heads each
    in_group = part(base.num_heads // base.num_kv_heads, target.num_heads // target.num_kv_heads)
    sizes["num_heads"] = in_group * sizes["num_kv_heads"]
    if base.num_experts:
        for field in ("hidden_size", "intermediate_size"):
            aligned = round(sizes[field] / EXPERT_WIDTHS) * EXPERT_WIDTHS
            sizes[field] = min(max(aligned, getattr(target, field)), getattr(base, field))
    if LONGROPE in base.flags:  # which fixes hidden_size // heads
        sizes["hidden_size"] = max(target.hidden_size, base.head_dim * sizes["num_heads"])
    if base.table.hidden_in_heads:
        heads = sizes["num_heads"]
        sizes["hidden_size"] = sizes["hidden_size"] // heads * heads
        if sizes["hidden_size"] < target.hidden_size:  # no multiple of these heads in between: change neither yet
            sizes["hidden_size"] = current.hidden_size
            sizes["num_heads"] = current.num_heads
            sizes["num_kv_heads"] = current.num_kv_heads
    return replace(base, **sizes)  # type: ignore[arg-type]
