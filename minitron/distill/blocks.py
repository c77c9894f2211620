"""Activation checkpointing and compilation of layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from minitron.architecture import Architecture

ACTIVATION_CHECKPOINTING = ("none", "selective", "full")
# what "selective" keeps: products of matrices and attention; norms, activations and rotations are cheap to do again
_KEPT = (
    "mm",
    "addmm",
    "bmm",
    "_grouped_mm",
    "_scaled_mm",  # FP8
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)

GRAPHS = 64  # of one layer's code
GRAPHS_OF_A_SHAPE = 8  # at most, of kinds of layers, sizes of micro-batches, and settings

_shapes: set[Architecture] = set()  # of the models whose layers this process has compiled


@contextmanager
def running_blocks(
    student: nn.Module, *, activation_checkpointing: str, compiled: bool, recorded: Collection[str] = ()
) -> Iterator[None]:
    """Apply activation checkpointing and compilation to the student's layers inside the context.

    activation_checkpointing: keep all activations of a layer ("none"), the results of matrix products and attention
    ("selective"), or only the layer's input ("full"); the rest is recomputed in the backward pass. compiled: compile every
    layer, for each shape of micro-batches, except those with a module in `recorded`, whose outputs are read by hooks. Without
    gradients, as in evaluations, whose batches have many shapes, layers run as they are.
    """

    def wrapped(name: str, layer: nn.Module) -> Callable[..., Any]:
        plain: Callable[..., Any] = layer.forward
        forward = plain
        if activation_checkpointing != "none":
            forward = partial(_recomputed, forward, activation_checkpointing == "selective")
        if compiled and not _contains(name, recorded):
            return partial(_with_gradients, _compiled(forward), plain)
        return forward

    with _replaced(student, wrapped), _many_graphs(student if compiled else None):
        yield


@contextmanager
def compiled_blocks(teacher: nn.Module, *, recorded: Collection[str] = ()) -> Iterator[None]:
    """Compile the layers of a teacher that is run on micro-batches inside the context, as `running_blocks` does."""

    def wrapped(name: str, layer: nn.Module) -> Callable[..., Any]:
        return layer.forward if _contains(name, recorded) else _compiled(layer.forward)

    with _replaced(teacher, wrapped), _many_graphs(teacher):
        yield


@contextmanager
def _replaced(model: nn.Module, wrapped: Callable[[str, nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Inside the context each layer's forward is what `wrapped` makes of its name and the layer."""
    prefix = Architecture.from_config(model.config).table.layers
    layers = [(f"{prefix}.{name}", layer) for name, layer in model.get_submodule(prefix).named_children()]
    for name, layer in layers:
        layer.forward = wrapped(name, layer)
    try:
        yield
    finally:
        for _, layer in layers:
            del layer.forward


def _contains(layer: str, modules: Collection[str]) -> bool:
    return any(module.startswith(f"{layer}.") for module in modules)


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(forward, dynamic=False)  # micro-batches have two sizes at most


@contextmanager
def _many_graphs(compiled: nn.Module | None) -> Iterator[None]:
    """Let layers of a family, which share their code, have a graph for each model, kind of layer and size of micro-batch:
    beyond PyTorch's limit of 8 they would run as they are, without a word that users see.

    Models whose layers have the same sizes share graphs, also one after the other, as the candidates of a search. All graphs
    are dropped before those of further sizes would reach the limit.
    """
    if compiled is None:
        yield
        return
    import torch._dynamo
    from torch._dynamo import config

    shape = replace(Architecture.from_config(compiled.config), num_layers=1)
    if shape not in _shapes and len(_shapes) >= max(1, GRAPHS // GRAPHS_OF_A_SHAPE):
        torch._dynamo.reset()
        _shapes.clear()
    _shapes.add(shape)
    with config.patch(recompile_limit=GRAPHS):
        yield


def _with_gradients(compiled: Callable[..., Any], plain: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return (compiled if torch.is_grad_enabled() else plain)(*arguments, **named)


def _recomputed(forward: Callable[..., Any], selective: bool, *arguments: Any, **named: Any) -> Any:
    options: dict[str, Any] = (
        {"context_fn": partial(create_selective_checkpoint_contexts, _kept())} if selective else {}
    )
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options, **named)


def _kept() -> list[Any]:
    aten = torch.ops.aten
    return [getattr(aten, name).default for name in _KEPT if hasattr(aten, name)]
