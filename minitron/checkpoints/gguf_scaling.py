"""The scaling of RoPE in the keys of a GGUF file's header, which transformers does not read: it builds the model without."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError

from minitron.arguments import short_repr
from minitron.checkpoints.gguf_header import GgufHeader
from minitron.checkpoints.gguf_rope import FULL, ORIGINAL, ORIGINAL_LENGTH, frequencies_of, rope_of
from minitron.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LINEAR, YARN = "linear", "yarn"  # in a header and in transformers
TYPES = ("none", LINEAR, YARN, "longrope")  # in a header
TYPE, FACTOR, OLD_FACTOR = "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"
ATTENTION, YARN_ATTENTION = "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"
FAST, SLOW = "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"
EXTRAPOLATION, MULTIPLIER = "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_log_multiplier"
ALPHA = "rope.scaling.alpha"
SCALING = (
    *(TYPE, FACTOR, OLD_FACTOR, ATTENTION, YARN_ATTENTION, ORIGINAL_LENGTH),
    *(FAST, SLOW, EXTRAPOLATION, MULTIPLIER, ALPHA),
    "rope.scaling.finetuned",  # whether the model was trained with it
)
"""The header's keys of the scaling."""


def convert_scaling(config: PretrainedConfig, header: GgufHeader, where: str) -> None:
    """Give the config of a GGUF file, which transformers has read, the linear or yarn scaling of RoPE in the header's keys.

    Raises InputError for another scaling, and for one with which transformers' model would not compute what llama.cpp does.
    where: the file's name in errors.
    """
    scaling = _read_scaling(header, config.max_position_embeddings, where)
    if not scaling:
        return
    before = config.rope_parameters
    plain = rope_of(config)
    scaled = plain | scaling
    # Gemma 3 has other parameters in the layers with a sliding window, which llama.cpp does not scale
    config.rope_parameters = scaled if plain is before else before | {FULL: scaled}
    if not _is_exact(config, plain, scaled) or not _is_kept(config):
        raise InputError(
            f"{where}: its header scales RoPE ({scaling['rope_type']}, factor {scaling['factor']}), with which transformers' "
            f"{config.model_type} model would not compute what llama.cpp does",
            ORIGINAL,
        )


def _read_scaling(header: GgufHeader, context: int, where: str) -> dict[str, Any]:
    """transformers' parameters of the scaling in a header's keys, none without one. context: the model's, in tokens."""

    def number(key: str, default: float) -> float:
        value = header.values.get(key, default)
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise InputError(f"{where}: {header.architecture}.{key} is {short_repr(value)} in its header", ORIGINAL)
        return float(value)

    kind = header.values.get(TYPE, LINEAR)
    factor = number(FACTOR, number(OLD_FACTOR, 0.0)) or 1.0  # llama.cpp takes 0 for none
    attention, length = number(ATTENTION, 1.0), int(number(ORIGINAL_LENGTH, context))
    scaling: dict[str, Any] = {}
    expected: dict[str, float] = {ATTENTION: 1.0}
    if kind not in TYPES:
        raise InputError(f"{where}: {header.architecture}.{TYPE} is {short_repr(kind)} in its header", ORIGINAL)
    if kind == "longrope":
        expected[FACTOR] = 1.0  # its factors are tensors
    elif kind == LINEAR and factor != 1:
        scaling = {"rope_type": LINEAR, "factor": factor}
    elif kind == YARN and factor != 1:
        attention *= _magnitude(factor, 1.0) / _magnitude(factor, number(MULTIPLIER, 0.0))
        scaling = {
            "rope_type": YARN,
            "factor": factor,
            "original_max_position_embeddings": length,
            "attention_factor": attention,
            "beta_fast": number(FAST, 32.0),
            "beta_slow": number(SLOW, 1.0),
        }
        expected = {}
    expected |= {YARN_ATTENTION: attention, EXTRAPOLATION: float(kind == YARN), ALPHA: 0.0}
    for key, value in expected.items():
        if not math.isclose(number(key, value), value, rel_tol=1e-6):
            raise InputError(
                f"{where}: {header.architecture}.{key} is {header.values[key]} in its header, but transformers' model computes "
                f"with {value} for {TYPE} {short_repr(kind)}",
                ORIGINAL,
            )
    return scaling


def _magnitude(factor: float, multiplier: float) -> float:
    """yarn's factor of queries and keys."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def _is_kept(config: PretrainedConfig) -> bool:
    """Whether transformers accepts the parameters of RoPE of a config and leaves them as they are, also when it is saved."""
    try:
        again = type(config).from_dict(config.to_dict())
    except (ValueError, KeyError, TypeError, StrictDataclassError):
        return False
    return bool(again.rope_parameters == config.rope_parameters)


def _is_exact(config: PretrainedConfig, plain: dict[str, Any], scaled: dict[str, Any]) -> bool:
    """Whether transformers' rotary frequencies with scaled parameters are llama.cpp's (ggml_rope_yarn_corr_dims and
    rope_yarn in ggml), which it computes from those without."""
    unscaled = frequencies_of(config, plain | {"rope_type": LINEAR, "factor": 1.0})
    expected = unscaled / scaled["factor"]
    if scaled["rope_type"] == YARN:
        theta, tokens = scaled["rope_theta"], scaled["original_max_position_embeddings"]
        rotations = scaled["beta_fast"], scaled["beta_slow"]
        if theta <= 1 or tokens < 1 or min(rotations) <= 0:
            return False
        size = 2 * len(unscaled)
        first, last = (size * math.log(tokens / (2 * math.pi * count)) / (2 * math.log(theta)) for count in rotations)
        low, high = max(0, math.floor(first)), min(size - 1, math.ceil(last))
        ramp = ((torch.arange(len(unscaled)) - low) / max(0.001, high - low)).clamp(0, 1)
        expected = expected * ramp + unscaled * (1 - ramp)
    return torch.allclose(frequencies_of(config, scaled), expected, rtol=1e-5, atol=0.0)
