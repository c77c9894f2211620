"""Selection of the parameters to train: all, the norms, or low-rank adapters that are merged into the model afterwards."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minitron.architecture import Architecture
from minitron.arguments import check_model
from minitron.errors import InputError
from minitron.meta_models import InMemory, Weights, read_
from minitron.sharded_tensors import own_part, whole

METHODS = ("full", "norms", "lora")
ADAPTER = "correction"
"""peft's name of the adapters."""


class AdaptedWeights:
    """Where the parameters of a `model` with adapters are read from: those of the model itself from `weights`, under the names
    that they had without adapters, and the initial values of the adapters, A random and B zero.

    A is drawn again whenever it is read, so that no process has more than one of them. It has the values that peft's
    initialisation has after `torch.manual_seed(0)`, the same in every process.
    """

    def __init__(self, model: nn.Module, weights: Weights) -> None:
        self.weights = weights
        self._first: dict[str, tuple[torch.Size, Tensor]] = {}  # shape, and the generator's state before it is drawn
        self._second: dict[str, torch.Size] = {}
        generator = torch.Generator().manual_seed(0)
        for name, layer in _adapted(model):
            first, second = _matrices(layer)
            for matrix in (first, second):  # peft draws both as those of any Linear module before
                torch.rand(matrix.shape, generator=generator)
            self._first[f"{name}.lora_A.{ADAPTER}.weight"] = first.shape, generator.get_state()
            self._second[f"{name}.lora_B.{ADAPTER}.weight"] = second.shape
            torch.rand(first.shape, generator=generator)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._first:
            shape, state = self._first[name]
            return _uniform(shape, state)[start:stop]
        if name in self._second:
            return torch.zeros(max(0, stop - start), self._second[name][1])
        return self.weights.rows(name.replace(".base_layer.", "."), start, stop)


@contextmanager
def trainable(
    model: nn.Module, method: str, *, lora_rank: int = 16, weights: Weights | None = None
) -> Iterator[Weights | None]:
    """Let only the parameters of `method` require a gradient inside the context. On exit all parameters require a gradient
    again, and adapters are merged into the model; after an error they are dropped.

    "full" trains all parameters, "norms" the weights and biases of the norms, "lora" adapters of rank `lora_rank` on every
    Linear module of the layers, by peft (arXiv 2106.09685).

    weights: where a model on the meta device is read from. Yields where it is to be read from inside the context, adapters
    included; None for a model in memory. A model that is sharded then is merged in parts: its processes leave the context
    together.

    Raises InputError for another method, for lora without peft, and for lora on a mixture of experts, whose experts are not
    Linear modules.
    """
    check_model("model", model)
    if method not in METHODS:
        raise InputError(f"method: {method!r} is not a training method", f"use one of {', '.join(METHODS)}")
    if method == "lora":
        with _lora(model, lora_rank, weights) as adapted:
            yield adapted
        return
    if method == "norms":
        names = [name for name, parameter in model.named_parameters() if _is_norm(name, parameter.ndim)]
        model.requires_grad_(False)
        for name in names:
            model.get_parameter(name).requires_grad_(True)
    try:
        yield weights
    finally:
        model.requires_grad_(True)


def trained_parameters(architecture: Architecture, method: str, *, lora_rank: int = 16) -> int:
    """Number of parameters that `trainable` trains: of "full" all, of "norms" those of the norms, of "lora" rank · (in + out)
    for each matrix of the layers."""
    if method == "full":
        return architecture.num_parameters
    inner, outer = (
        [(parameter.name, [architecture.axis_size(axis) for axis in parameter.axes]) for parameter in parameters]
        for parameters in (architecture.layer_parameters, architecture.outer_parameters)
    )
    if method == "lora":
        return architecture.num_layers * lora_rank * sum(sum(shape) for _, shape in inner if len(shape) == 2)
    norms = [sum(shape[0] for name, shape in each if _is_norm(name, len(shape))) for each in (inner, outer)]
    return architecture.num_layers * norms[0] + norms[1]


def _is_norm(name: str, dimensions: int) -> bool:
    return dimensions == 1 and "norm" in name


def check_lora(architecture: Architecture) -> None:
    """Raise InputError if adapters cannot be trained: without peft, or on a mixture of experts."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("method: 'lora' needs the package peft", "pip install 'minitron[lora]'")
    if architecture.table.experts:
        raise InputError("method: 'lora' cannot adapt the experts of a mixture-of-experts model", "use full or norms")


@contextmanager
def _lora(model: nn.Module, rank: int, weights: Weights | None) -> Iterator[Weights | None]:
    architecture = Architecture.from_config(model.config)
    check_lora(architecture)
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    table = architecture.table
    layers = model.get_submodule(table.layers)
    targets = sorted({name.rsplit(".", 1)[-1] for name, m in layers.named_modules() if isinstance(m, nn.Linear)})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=0.0)
    own, plain = next(model.parameters()), InMemory(model) if weights is None else weights
    adapters = LoraModel(model, config, ADAPTER, low_cpu_mem_usage=True)  # on the meta device, in float32
    for _, layer in _adapted(model):
        for matrices in (layer.lora_A, layer.lora_B):
            matrices.to(layer.get_base_layer().weight.dtype)
    adapted = AdaptedWeights(model, plain)
    if not own.is_meta:
        read_(model, adapted, own.dtype, own.device)
    try:
        yield None if weights is None else adapted
        for _, layer in _adapted(model):
            _merge(layer)
    finally:
        adapters.unload()
        model.requires_grad_(True)


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    """Names and modules of peft's Linear modules with adapters, in the order in which they are made."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _matrices(layer: Any) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of an adapter."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _uniform(shape: torch.Size, state: Tensor) -> Tensor:
    """Kaiming's uniform initialisation, as a Linear module has it, from this state of a generator."""
    generator = torch.Generator()
    generator.set_state(state)
    bound = 1 / math.sqrt(shape[1])
    # in two roundings: one of uniform_ may differ in the last bit between kinds of CPUs
    return torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)


@torch.no_grad()
def _merge(layer: Any) -> None:
    """Add the adapter's product to the weight. Of a sharded one, each process adds its own rows, which are those of B."""
    first, second = _matrices(layer)
    product = own_part(second).float() @ whole(first).float()
    own_part(layer.get_base_layer().weight).add_(product, alpha=layer.scaling[ADAPTER])
