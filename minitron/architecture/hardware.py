"""Notes on why a smaller shape may not be faster on the hardware.

A matrix multiplication runs in whole tiles, and 16-bit tensor cores need every dimension to be a multiple of 8, so a slightly
smaller dimension may cost as much as before.
"""

from __future__ import annotations

import math

from minitron.architecture import Architecture
from minitron.arguments import check_type


def hardware_notes(base: Architecture, target: Architecture, *, tile: int = 64, alignment: int = 8) -> list[str]:
    """Sentences on why `target`, pruned from `base`, is smaller but not faster; empty if there is nothing to report.

    tile: tile width of a matrix multiplication. alignment: the multiple that tensor cores need (8 for 16-bit types). Only
    dimensions that pruning changed are checked.
    """
    check_type("base", base, Architecture)
    check_type("target", target, Architecture)
    notes: list[str] = []
    for field in ("hidden_size", "intermediate_size"):
        before = getattr(base, field)
        after = getattr(target, field)
        if after < before:
            notes += _misaligned(field, after, before, alignment) + _same_tiles(field, after, before, tile)
            if target.num_experts and after % alignment:
                notes.append(
                    f"{field}: transformers' grouped multiplication of experts refuses {after}; load the model with "
                    f'experts_implementation="eager", or take a multiple of {alignment}.'
                )
    if target.num_heads < base.num_heads:
        field = f"num_heads: {target.num_heads} x head_dim"
        width = target.num_heads * target.head_dim
        notes += _misaligned(field, width, base.num_heads * base.head_dim, alignment)
        if target.num_kv_heads == base.num_kv_heads:
            notes.append(
                f"num_heads: {target.num_heads} query heads instead of {base.num_heads}, but num_kv_heads is still "
                f"{base.num_kv_heads}, so a layer's KV cache is as large as before; fewer KV heads make it smaller."
            )
    return notes + _uneven_groups(base, target)


def _misaligned(field: str, after: int, before: int, alignment: int) -> list[str]:
    if after % alignment == 0:
        return []
    return [
        f"{field}: {after} is not a multiple of {alignment}, which 16-bit tensor cores need; "
        f"better {_nearest(after, before, alignment)}."
    ]


def _same_tiles(field: str, after: int, before: int, tile: int) -> list[str]:
    tiles = math.ceil(after / tile)
    if tiles < math.ceil(before / tile):
        return []
    smaller = (math.ceil(before / tile) - 1) * tile
    better = f"better {smaller}, or keep {before}" if smaller else f"keep {before}"
    return [
        f"{field}: {after} fills as many tiles of {tile} as {before} did ({tiles}), so the multiplications hardly get "
        f"faster; {better}."
    ]


def _nearest(value: int, largest: int, multiple: int) -> str:
    below = value // multiple * multiple
    above = math.ceil(value / multiple) * multiple
    return " or ".join(str(choice) for choice in (below, above) if 0 < choice <= largest) or f"keep {largest}"


def _uneven_groups(base: Architecture, target: Architecture) -> list[str]:
    uneven = [
        gpus
        for gpus in (2, 4, 8)
        if base.num_kv_heads % gpus == 0 and target.num_kv_heads % gpus and target.num_kv_heads > 1
    ]
    if target.num_kv_heads == base.num_kv_heads or not uneven:
        return []
    better = [n for n in (1, 2, 4, 8, 16, 32) if n < base.num_kv_heads]
    below = max((n for n in better if n < target.num_kv_heads), default=1)
    above = min((n for n in better if n > target.num_kv_heads), default=base.num_kv_heads)
    return [
        f"num_kv_heads: {target.num_kv_heads} does not divide over {uneven[0]} GPUs in tensor parallelism, which "
        f"{base.num_kv_heads} did; better {below} or {above}."
    ]
