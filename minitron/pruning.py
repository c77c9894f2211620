"""Cutting a smaller model out of a larger one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from minitron.architecture import Architecture
from minitron.importance.scores import ImportanceScores
from minitron.models import quiet_transformers
from minitron.selection import Selection, select


def prune(model: nn.Module, architecture: Architecture, scores: ImportanceScores) -> nn.Module:
    """A new transformers model of `architecture` with the best-scored units of `model`, kept in order.

    The result has the class, dtype and device of `model`, which stays as it is. Its logits equal those of `model` with
    the removed units masked, to rounding. Raises InputError when `architecture` does not fit inside the model.
    """
    base = Architecture.from_config(model.config)
    selection = select(scores, base, architecture)
    config = architecture.to_config(model.config, selection.layers)
    source = model.state_dict()
    state = dict(sliced_tensors(source.__getitem__, base, architecture, selection))
    if architecture.tied:
        state[architecture.table.head] = state[architecture.table.embedding]
    dtype = next(model.parameters()).dtype
    with quiet_transformers():
        result: nn.Module = type(model).from_pretrained(None, config=config, state_dict=state, dtype=dtype)  # type: ignore[attr-defined]
    if hasattr(model, "generation_config"):
        result.generation_config = model.generation_config
    return result.to(next(model.parameters()).device).eval()


def sliced_tensors(
    source: Callable[[str], Tensor], base: Architecture, target: Architecture, selection: Selection
) -> Iterator[tuple[str, Tensor]]:
    """Yield (new name, new tensor) one at a time; `source` gives a tensor of the original by its name.

    Nothing but the tensor at hand is in memory, so a model larger than memory can be cut shard by shard.
    """
    for parameter in base.outer_parameters:
        yield parameter.name, _cut(source(parameter.name), parameter.axes, selection, 0, target.head_dim)
    prefix = base.table.layers
    for new, old in enumerate(selection.layers):
        for parameter in base.layer_parameters:
            tensor = _cut(source(f"{prefix}.{old}.{parameter.name}"), parameter.axes, selection, new, target.head_dim)
            yield f"{prefix}.{new}.{parameter.name}", tensor


def _cut(tensor: Tensor, axes: tuple[str, ...], selection: Selection, layer: int, head_dim: int) -> Tensor:
    for dimension, axis in enumerate(axes):
        kept = selection.kept(axis, layer, head_dim)
        if kept is not None and len(kept) < tensor.shape[dimension]:
            tensor = tensor.index_select(dimension, kept.to(tensor.device))
    return tensor.detach().clone(memory_format=torch.contiguous_format)
