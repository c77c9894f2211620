"""The scaling of RoPE in a tensor of a GGUF file, which transformers does not read: it builds the model without."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from minitron.checkpoints.gguf_header import GgufHeader
from minitron.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FACTORS = "rope_freqs.weight"
"""By what each rotary frequency is divided, [head_dim / 2] in float32: how llama.cpp stores the scaling of Llama 3.1 to 3.3."""
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of all Llama 3 models
TRAINED = 8192  # tokens that Llama 3 models were trained with before their frequencies were scaled
ORIGINAL_LENGTH = "rope.scaling.original_context_length"
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of the types of layers
FLOAT32 = 0  # ggml's number of the type
ORIGINAL = "give the model as safetensors, from which the file was converted"


def rope_of(config: PretrainedConfig, layers: str = FULL) -> dict[str, Any]:
    """The parameters of RoPE in a type of layers, of a config with one for all types or one for each."""
    parameters: dict[str, Any] = config.rope_parameters
    result: dict[str, Any] = parameters.get(layers, parameters)
    return result


def add_scaling(config: PretrainedConfig, header: GgufHeader, where: str) -> None:
    """Give the config of a GGUF file, which transformers has read, the scaling of RoPE in its tensor `FACTORS`, if any.

    Raises InputError unless the factors are those of a Llama 3 model. where: the file's name in errors.
    """
    if FACTORS not in header.tensors:
        return
    factors = _read(header)
    plain: dict[str, Any] = dict(config.rope_parameters)
    if factors is not None and torch.all(factors == 1):
        return
    length = header.values.get(ORIGINAL_LENGTH, TRAINED)
    scaled = plain | LLAMA3 | {"original_max_position_embeddings": length}
    if factors is not None and plain.get("rope_type") == "default" and "rope_theta" in plain:
        scaled["factor"] = float(factors.max())
        expected = frequencies_of(config, scaled | {"factor": 1.0}) / frequencies_of(config, scaled)
        if expected.shape == factors.shape and torch.allclose(expected, factors, rtol=1e-5):
            config.rope_parameters = scaled
            return
    raise InputError(
        f"{where}: the factors in {FACTORS} scale RoPE, which transformers does not read from a GGUF file, and they are not "
        f"those of a Llama 3 model with {length:,} tokens before the scaling",
        ORIGINAL,
    )


def _read(header: GgufHeader) -> Tensor | None:
    """The factors in float32; None if they are not stored as such."""
    stored = header.tensors[FACTORS]
    if stored.type != FLOAT32 or len(stored.shape) != 1:
        return None
    with header.path.open("rb") as file:
        file.seek(stored.start)
        values = np.frombuffer(file.read(4 * stored.shape[0]), dtype=f"{header.order}f4")
    return torch.from_numpy(values.astype(np.float32)) if len(values) == stored.shape[0] else None


def frequencies_of(config: PretrainedConfig, rope_parameters: dict[str, Any]) -> Tensor:
    """transformers' rotary frequencies, [rotating part of a head / 2], of a config with these parameters of RoPE, which are not
    of the type "default"."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    changed = copy.deepcopy(config)
    changed.rope_parameters = rope_parameters
    frequencies: Tensor = ROPE_INIT_FUNCTIONS[rope_parameters["rope_type"]](changed, torch.device("cpu"))[0]
    return frequencies
