"""Merging removed attention heads into the kept ones (arXiv 2407.14679 section 2.3, "residual" heads).

Of the L query heads of a KV group, ranked by importance, the first K are kept, and head i of the last L - K kept ones becomes
head_i + sign · (head_i - head_(2K-i+1)), i in [2K-L+1, K]: the weakest kept head is merged with the strongest removed one.

What the paper leaves open, and the choice made here. It prints the range as [K-(L-K), K], whose first index would need head
L+1; the range above pairs every removed head once. It does not say which matrices are added: here the rows of the query
projection and its bias, because for grouped-query attention the paper restricts the method to query heads; keys, values and
the output projection are sliced as usual. Its sign is +1, which moves away from the removed head (2 · head_i - head_j); -1
is that of layer collapse, which moves towards it and with one partner yields exactly head_j. The paper gives no figure for
the gain, so merging is off by default.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minitron.architecture import Architecture
from minitron.errors import InputError
from minitron.families.table import HEADS
from minitron.importance.scores import ImportanceScores
from minitron.pruning.selection import Selection


def merged_source(
    source: Callable[[str], Tensor],
    base: Architecture,
    target: Architecture,
    selection: Selection,
    scores: ImportanceScores,
    sign: int,
) -> Callable[[str], Tensor]:
    """`source` with removed query heads merged into kept ones, for `sliced_tensors`.

    source: returns a tensor of `base` by name. selection: the units kept for `target`, chosen by `scores` (heads [L, H]).
    Sums are computed in at least float32 and returned in the tensor's dtype. Raises InputError for a sign other than +1 and
    -1, if no group loses a head, and if a group loses more than half (a removed head would have no partner).
    """
    in_group = base.num_heads // base.num_kv_heads
    keep = target.num_heads // target.num_kv_heads
    if sign not in (-1, 1):
        raise InputError(f"merge_heads: {sign!r} is not a sign", "use 1 (the paper's) or -1, or 0 for no merging")
    if keep == in_group:
        raise InputError(
            f"merge_heads: every KV group keeps its {in_group} query heads, so there is nothing to merge",
            "leave it out, or give a smaller num_heads",
        )
    if in_group > 2 * keep:
        raise InputError(
            f"merge_heads: {in_group} query heads per KV group cannot be merged into {keep}, fewer than half",
            f"keep at least {-(-in_group // 2) * target.num_kv_heads} heads, or leave merging out",
        )
    offsets = {
        f"{base.table.layers}.{old}.{parameter.name}": (new, offset)
        for parameter in base.layer_parameters
        if (offset := _query_rows(parameter.axes[0], base)) is not None
        for new, old in enumerate(selection.layers)
    }

    def merged(name: str) -> Tensor:
        tensor = source(name)
        if name not in offsets:
            return tensor
        new, offset = offsets[name]
        stay, go = _partners(scores.heads[selection.layers[new]], selection, new, in_group)
        result = tensor.detach().clone()
        size = base.num_heads * base.head_dim
        queries = result[offset : offset + size].unflatten(0, (base.num_heads, base.head_dim))
        wide = torch.promote_types(queries.dtype, torch.float32)
        kept, removed = queries[stay].to(wide), queries[go].to(wide)
        queries[stay] = (kept + sign * (kept - removed)).to(queries.dtype)
        return result

    return merged


def _query_rows(axis: str | tuple[str, ...], base: Architecture) -> int | None:
    """First row of the query heads in a tensor whose first dimension is `axis`; None if it has no query heads."""
    parts = (axis,) if isinstance(axis, str) else axis
    if HEADS not in parts:
        return None
    return sum(base.axis_size(part) for part in parts[: parts.index(HEADS)])


def _partners(scores: Tensor, selection: Selection, layer: int, in_group: int) -> tuple[Tensor, Tensor]:
    """Kept heads and the removed heads merged into them, two int64 [pairs]: in every kept KV group the weakest kept head with
    the strongest removed one, the second weakest with the second strongest, and so on."""
    kept = set(selection.heads[layer].tolist())
    stay: list[int] = []
    go: list[int] = []
    for group in selection.kv_heads[layer].tolist():
        heads = range(group * in_group, (group + 1) * in_group)
        ranked = sorted(heads, key=lambda head: (-float(scores[head]), head))
        going = [head for head in ranked if head not in kept]
        staying = [head for head in reversed(ranked) if head in kept]
        stay += staying[: len(going)]
        go += going
    return torch.tensor(stay), torch.tensor(go)
