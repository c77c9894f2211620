"""Activation checkpointing and compilation of the student's layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
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
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


@contextmanager
def running_blocks(
    student: nn.Module, *, activation_checkpointing: str, compiled: bool, recorded: Collection[str] = ()
) -> Iterator[None]:
    """Apply activation checkpointing and compilation to the student's layers inside the context.

    activation_checkpointing: keep all activations of a layer ("none"), the results of matrix products and attention
    ("selective"), or only the layer's input ("full"); the rest is recomputed in the backward pass. compiled: compile every
    layer except those with a module in `recorded`, whose outputs are read by hooks.
    """
    prefix = Architecture.from_config(student.config).table.layers
    layers = [(f"{prefix}.{name}", layer) for name, layer in student.get_submodule(prefix).named_children()]
    for name, layer in layers:
        forward: Callable[..., Any] = layer.forward
        if activation_checkpointing != "none":
            forward = partial(_recomputed, forward, activation_checkpointing == "selective")
        if compiled and not any(module.startswith(f"{name}.") for module in recorded):
            forward = torch.compile(forward)
        layer.forward = forward
    try:
        yield
    finally:
        for _, layer in layers:
            del layer.forward


def _recomputed(forward: Callable[..., Any], selective: bool, *arguments: Any, **named: Any) -> Any:
    options: dict[str, Any] = (
        {"context_fn": partial(create_selective_checkpoint_contexts, _kept())} if selective else {}
    )
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options, **named)


def _kept() -> list[Any]:
    aten = torch.ops.aten
    return [getattr(aten, name).default for name in _KEPT if hasattr(aten, name)]
