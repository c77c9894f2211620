"""Temporary removal of layers from a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from minitron.families import family_of
from minitron.models import layers_of


@contextmanager
def without_layers(model: Any, removed: Collection[int]) -> Iterator[None]:
    """Remove the decoder layers with the indices `removed` from `model` inside the context.

    The list of layers, the config's number of layers and its per-layer lists, and the layers' own indices (into the KV cache)
    are adapted, and restored on exit. No weight is copied or moved.
    """
    config = model.config
    table = family_of(config.model_type)
    layers = layers_of(model)
    kept = [index for index in range(len(layers)) if index not in removed]
    parent, _, attribute = table.layers.rpartition(".")
    lists = {name: getattr(config, name, None) for name in table.per_layer}
    before = {
        "num_hidden_layers": len(layers),
        **{name: values for name, values in lists.items() if values is not None},
    }
    numbered: list[tuple[Any, int]] = [
        (module, index) for index in kept for module in layers[index].modules() if hasattr(module, "layer_idx")
    ]
    try:
        setattr(model.get_submodule(parent), attribute, nn.ModuleList([layers[index] for index in kept]))
        for name, value in before.items():
            setattr(config, name, len(kept) if name == "num_hidden_layers" else [value[index] for index in kept])
        for module, index in numbered:
            module.layer_idx = kept.index(index)
        yield
    finally:
        setattr(model.get_submodule(parent), attribute, layers)
        for name, value in before.items():
            setattr(config, name, value)
        for module, index in numbered:
            module.layer_idx = index
