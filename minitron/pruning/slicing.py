"""Slicing the weights of a smaller model out of a larger one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from minitron.architecture import Architecture
from minitron.arguments import check_model, check_type
from minitron.families.table import EXPERTS, Axis
from minitron.importance.scores import ImportanceScores
from minitron.models import quiet_transformers
from minitron.pruning.head_merging import merged_source
from minitron.pruning.selection import Selection, select


def prune(
    model: nn.Module,
    architecture: Architecture,
    scores: ImportanceScores,
    *,
    layers: Sequence[int] | None = None,
    merge_heads: int = 0,
) -> nn.Module:
    """A new transformers model of `architecture` with the highest-scored units of `model`, in their original order.

    model: a transformers causal language model of a supported family; it is not changed, and the result has its class, dtype
    and device. layers: the layers to keep; by default the least important contiguous block is removed. merge_heads: 1 or -1
    merges removed query heads into kept ones (see `minitron.pruning.head_merging`), 0 drops them. Without merging, the logits
    equal those of `model` with the removed units masked, up to rounding. Raises InputError if `architecture` does not fit
    inside the model, if `layers` does not match both, and for arguments of the wrong type.
    """
    check_model("model", model)
    check_type("architecture", architecture, Architecture)
    check_type("scores", scores, ImportanceScores, "ImportanceScores")
    check_type("merge_heads", merge_heads, Integral)
    base = Architecture.from_config(model.config)
    selection = select(scores, base, architecture, layers=layers)
    config = architecture.to_config(model.config, selection.layers)
    source = model.state_dict().__getitem__
    if merge_heads:
        source = merged_source(source, base, architecture, selection, scores, merge_heads)
    state = dict(sliced_tensors(source, base, architecture, selection))
    if architecture.tied:
        state[architecture.table.head] = state[architecture.table.embedding]
    dtype = next(model.parameters()).dtype
    with quiet_transformers():
        result: nn.Module = type(model).from_pretrained(None, config=config, state_dict=state, dtype=dtype)  # type: ignore[attr-defined]
    if hasattr(model, "generation_config"):
        result.generation_config = model.generation_config
    result._weight_conversions = None  # type: ignore[assignment]  # save in the usual layout of this model type
    return result.to(next(model.parameters()).device).eval()


def sliced_tensors(
    source: Callable[[str], Tensor], base: Architecture, target: Architecture, selection: Selection
) -> Iterator[tuple[str, Tensor]]:
    """Yield (new name, new tensor) one at a time. `source` returns a tensor of the original by name.

    Only the current tensor is in memory, so a model larger than memory can be sliced shard by shard. Raises InputError for
    arguments of the wrong type.
    """
    check_type("source", source, Callable, "a function from a tensor's name to the tensor")  # type: ignore[arg-type]
    check_type("base", base, Architecture)
    check_type("target", target, Architecture)
    check_type("selection", selection, Selection)
    for parameter in base.outer_parameters:
        tensor = _cut(source(parameter.name), parameter.axes, selection, 0, base)
        yield parameter.name, _rescaled(parameter.name, tensor, base, target)
    prefix = base.table.layers
    for new, old in enumerate(selection.layers):
        for parameter in base.layer_parameters:
            tensor = _cut(source(f"{prefix}.{old}.{parameter.name}"), parameter.axes, selection, new, base)
            yield f"{prefix}.{new}.{parameter.name}", tensor


def _cut(
    tensor: Tensor,
    axes: tuple[Axis, ...],
    selection: Selection,
    layer: int,
    base: Architecture,
    expert: int | None = None,
) -> Tensor:
    if axes[0] == EXPERTS:  # each expert keeps neurons of its own
        kept_experts = enumerate(selection.experts[layer].tolist())
        return torch.stack([_cut(tensor[old], axes[1:], selection, layer, base, new) for new, old in kept_experts])
    cut = tensor.detach()
    for dimension, axis in enumerate(axes):
        kept = _positions(axis, selection, layer, base, expert)
        if len(kept) < tensor.shape[dimension]:
            cut = cut.index_select(dimension, kept.to(tensor.device))
    if cut.data_ptr() == tensor.data_ptr():  # nothing was removed; index_select has copied everything else already
        cut = cut.clone()
    return cut.contiguous()


def _positions(axis: Axis, selection: Selection, layer: int, base: Architecture, expert: int | None) -> Tensor:
    if isinstance(axis, tuple):
        offset, parts = 0, []
        for part in axis:
            parts.append(offset + _positions(part, selection, layer, base, expert))
            offset += base.axis_size(part)
        return torch.cat(parts)
    kept = selection.kept(axis, layer, base.head_dim, expert)
    return torch.arange(base.axis_size(axis)) if kept is None else kept


def _rescaled(name: str, tensor: Tensor, base: Architecture, target: Architecture) -> Tensor:
    """Compensate for the smaller hidden size in a model that multiplies its embeddings by sqrt(hidden_size).

    The embedding matrix is multiplied by the missing factor; if it is also the head, the final norm divides by it.
    """
    table = base.table
    if not table.embedding_scaled or target.hidden_size == base.hidden_size:
        return tensor
    factor = math.sqrt(base.hidden_size / target.hidden_size)
    if name == table.embedding:
        return tensor * factor
    if name == f"{table.final_norm}.weight" and base.tied:
        weight = tensor.double() + table.norm_offset
        return (weight / factor - table.norm_offset).to(tensor.dtype)
    return tensor
