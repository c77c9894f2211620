"""Quantised checkpoints: which of them transformers can dequantise, and the resulting model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from minitron.checkpoints.headers import Header
from minitron.errors import InputError

FULL = "give the checkpoint that it was quantised from"


@dataclass(frozen=True)
class Method:
    """One `quant_method` of config.json.

    weight: suffixes of a quantised matrix's name. beside: suffixes of the tensors stored with it. Both replace `.weight`.
    package: the package that transformers needs to read it.
    """

    weight: tuple[str, ...]
    beside: tuple[str, ...]
    package: str = ""


METHODS = {
    "fp8": Method((".weight",), (".weight_scale_inv", ".activation_scale")),
    "compressed-tensors": Method(
        (".weight", ".weight_packed"),
        (
            *(".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale"),
            *(".input_scale", ".input_zero_point", ".input_global_scale"),
        ),
        "compressed-tensors",
    ),
    "bitsandbytes": Method(
        (".weight",),
        (
            *(".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map"),
            *(
                ".weight.quant_state.bitsandbytes__nf4",
                ".weight.quant_state.bitsandbytes__fp4",
                ".SCB",
                ".weight_format",
            ),
        ),
        "bitsandbytes",
    ),
}
GGUF = "gguf"  # transformers dequantises it whatever the config says


def settings_of(config: Any) -> dict[str, Any] | None:
    """The `quantization_config` of a transformers config as a dict; None for weights that are not quantised."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    return dict(settings) if isinstance(settings, Mapping) else dict(settings.to_dict())


def method_of(config: Any, where: str) -> str | None:
    """The `quant_method` of a config. Raises InputError for one that transformers cannot dequantise, or for which a package is
    missing."""
    settings = settings_of(config)
    if settings is None:
        return None
    name = str(settings.get("quant_method") or "")
    if name == GGUF:
        return None
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        name = "bitsandbytes"
    if name not in METHODS:
        raise InputError(
            f"{where}: the weights are quantised (quantization_config: quant_method {name!r}), and transformers cannot "
            f"dequantise them; it can dequantise {', '.join(METHODS)} and GGUF",
            FULL,
        )
    package = METHODS[name].package
    if package and find_spec(package.replace("-", "_")) is None:
        raise InputError(
            f"{where}: the weights are quantised (quantization_config: quant_method {name!r}), but {package} is not installed",
            f"pip install {package}, or {FULL}",
        )
    return name


def load_arguments(method: str | None) -> dict[str, Any]:
    """Arguments of from_pretrained with which the weights are dequantised, or can be by `plain_model` afterwards."""
    from transformers import CompressedTensorsConfig, FineGrainedFP8Config

    if method == "fp8":
        return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    if method == "compressed-tensors":
        return {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    return {"device_map": "cpu"} if method == "bitsandbytes" else {}


def plain_model(model: Any, method: str | None, dtype: torch.dtype) -> nn.Module:
    """A loaded model as one without quantisation in `dtype`, which is also saved as such."""
    if method == "bitsandbytes":
        model = model.dequantize()
    model.hf_quantizer = None
    model.is_quantized = False
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model._weight_conversions = None  # transformers would quantise again on saving
    plain: nn.Module = model.to(dtype)
    return plain


def as_ordinary(headers: Mapping[str, Header], method: str | None) -> tuple[dict[str, Header], frozenset[str]]:
    """(headers, quantised): the tensors of a quantised checkpoint by the names of the dequantised ones, without scales and
    other quantisation data; and the names of the quantised matrices, whose shape and dtype differ from the parameter's."""
    if method is None:
        return dict(headers), frozenset()
    known = METHODS[method]
    bases = {name.removesuffix(end) for name in headers for end in known.beside if name.endswith(end)}
    quantised = {base + end: f"{base}.weight" for base in bases for end in known.weight if base + end in headers}
    ordinary = {
        quantised.get(name, name): header for name, header in headers.items() if not name.endswith(known.beside)
    }
    return ordinary, frozenset(quantised.values())


def check_blocks(headers: Mapping[str, Header], config: Any, where: str) -> None:
    """Raise InputError for FP8 weights whose last block is incomplete: transformers derives the block size from the number of
    scales, and would apply wrong scales to such weights."""
    block = (settings_of(config) or {}).get("weight_block_size")
    if not block:
        return
    wrong = []
    for name, scale in headers.items():
        weight = headers.get(name.removesuffix("_scale_inv"))
        if not name.endswith(".weight_scale_inv") or weight is None:
            continue
        for rows, scales, size in zip(weight.shape, scale.shape, block, strict=False):
            if scales > 1 and rows != scales * size:
                wrong.append(f"{weight.name} is {list(weight.shape)} with {list(scale.shape)} scales")
                break
    if wrong:
        raise InputError(
            f"{where}: the weights are quantised to FP8 in blocks of {list(block)}, which transformers reads correctly only if "
            f"they divide the matrix; for {len(wrong)} matrices they do not ({', '.join(wrong[:3])})",
            FULL,
        )
