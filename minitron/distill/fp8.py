"""FP8 products in the linear modules of layers, by torchao.

For each product weights, inputs and gradients are scaled by their largest value, of a whole tensor or of each row, and rounded
to 8 bits; the result has the model's dtype. The weights themselves, and all else, stay in the dtype that they have.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minitron.errors import InputError
from minitron.models import layers_of

FP8 = ("none", "tensorwise", "rowwise")
"""No FP8, or what one scale is for (torchao's recipes of the same names)."""
CAPABILITY = (8, 9)
"""The lowest CUDA compute capability of GPUs with FP8 products."""
MULTIPLE = 16
"""Every dimension of an FP8 product is a multiple of this: sizes of weights, and tokens of a micro-batch."""


def check_fp8(dtype: torch.dtype | None, seq_length: int, capability: tuple[int, int] | None = None) -> None:
    """Raise InputError unless torchao is installed and FP8 products are possible in models that compute in `dtype`
    (None: not known), on rows of `seq_length` tokens, and on GPUs of this CUDA compute capability (None: not known, or CPUs,
    which emulate them)."""
    if capability is not None and capability < CAPABILITY:
        number, least = (".".join(map(str, value)) for value in (capability, CAPABILITY))
        raise InputError(
            f"fp8: this GPU has compute capability {number}, and FP8 products need {least}",
            "set it to none, or use a GPU of the generations Ada, Hopper or Blackwell",
        )
    if dtype not in (None, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        raise InputError(f"fp8: models that compute in {name}", "compute in bfloat16, or set it to none")
    if seq_length % MULTIPLE:
        raise InputError(f"fp8: rows of {seq_length} tokens", f"use a multiple of {MULTIPLE}, or set it to none")
    if importlib.util.find_spec("torchao") is None:
        raise InputError("fp8: needs the package torchao", "pip install 'minitron[fp8]'")


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The CUDA compute capability of a GPU; None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@contextmanager
def fp8_linears(model: nn.Module, scaling: str, device: torch.device, *, with_gradients: bool) -> Iterator[None]:
    """Inside the context the linear modules of the model's layers multiply in FP8 with one of `FP8`, on a CPU emulated.

    Modules with a dimension that is not a multiple of `MULTIPLE` do not, nor do low-rank adapters, the experts of a mixture,
    and all modules outside the layers, such as the head. with_gradients: only while gradients are computed, so that
    evaluations run in the model's own dtype, as the saved model will.
    """
    linears = [] if scaling == "none" else [module for layer in layers_of(model) for module in _linears(layer)]
    config = _config(scaling, emulate=device.type != "cuda") if linears else None
    for linear in linears:
        linear.forward = _fp8_forward(linear, config, with_gradients)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _linears(layer: nn.Module) -> list[nn.Linear]:
    return [
        module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
        and module.in_features % MULTIPLE == 0
        and module.out_features % MULTIPLE == 0
        and "lora_" not in name
    ]


def _config(scaling: str, *, emulate: bool) -> Any:
    # about extensions that are not for this machine
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from torchao.float8 import Float8LinearConfig

    return replace(Float8LinearConfig.from_recipe_name(scaling), emulate=emulate)


def _fp8_forward(linear: nn.Linear, config: Any, with_gradients: bool) -> Callable[[Tensor], Tensor]:
    """A closure and no object, and a module without weights that borrows the linear's: so all layers share a compiled graph,
    and FSDP's hooks keep finding the weights where they were."""
    from torchao.float8 import convert_to_float8_training

    biased = linear.bias is not None
    converted = convert_to_float8_training(
        nn.Linear(linear.in_features, linear.out_features, biased, device="meta"), config=config
    )
    plain = linear.forward

    def forward(inputs: Tensor) -> Tensor:
        if with_gradients and not torch.is_grad_enabled():
            return plain(inputs)
        weights = {"weight": linear.weight, "bias": linear.bias} if biased else {"weight": linear.weight}
        result: Tensor = functional_call(converted, weights, (inputs,))
        return result

    return forward
