"""Selection of the parameters to train: all, the norms, or low-rank adapters that are merged into the model afterwards."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from minitron.architecture import Architecture
from minitron.arguments import check_model
from minitron.device import random_devices
from minitron.errors import InputError

METHODS = ("full", "norms", "lora")


@contextmanager
def trainable(model: nn.Module, method: str, *, lora_rank: int = 16) -> Iterator[nn.Module]:
    """Let only the parameters of `method` require a gradient inside the context. On exit adapters are merged into the model and
    all parameters require a gradient again.

    "full" trains all parameters, "norms" the weights and biases of the norms, "lora" adapters of rank `lora_rank` on every
    Linear module of the layers, by peft (arXiv 2106.09685). Raises InputError for another method, for lora without peft, and
    for lora on a mixture of experts, whose experts are not Linear modules.
    """
    check_model("model", model)
    if method not in METHODS:
        raise InputError(f"method: {method!r} is not a training method", f"use one of {', '.join(METHODS)}")
    if method == "lora":
        with _lora(model, lora_rank) as adapted:
            yield adapted
        return
    if method == "norms":
        names = [name for name, parameter in model.named_parameters() if parameter.ndim == 1 and "norm" in name]
        model.requires_grad_(False)
        for name in names:
            model.get_parameter(name).requires_grad_(True)
    try:
        yield model
    finally:
        model.requires_grad_(True)


def check_lora(architecture: Architecture) -> None:
    """Raise InputError if adapters cannot be trained: without peft, or on a mixture of experts."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("method: 'lora' needs the package peft", "pip install 'minitron[lora]'")
    if architecture.table.experts:
        raise InputError("method: 'lora' cannot adapt the experts of a mixture-of-experts model", "use full or norms")


@contextmanager
def _lora(model: nn.Module, rank: int) -> Iterator[nn.Module]:
    architecture = Architecture.from_config(model.config)
    check_lora(architecture)
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    table = architecture.table
    layers = model.get_submodule(table.layers)
    targets = sorted({name.rsplit(".", 1)[-1] for name, m in layers.named_modules() if isinstance(m, nn.Linear)})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=0.0)
    with torch.random.fork_rng(devices=random_devices()):
        torch.manual_seed(0)  # every process starts from the same adapters
        adapters = LoraModel(model, config, "correction")
    try:
        yield model
    finally:
        adapters.merge_and_unload()
        model.requires_grad_(True)
