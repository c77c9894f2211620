"""Checkpoints whose matrices are quantised to FP8 with a scale per block, as those of DeepSeek and Qwen are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fp8_config(block: int = 32) -> dict[str, Any]:
    """What config.json says of it."""
    settings = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    return {"quantization_config": settings}


def in_fp8(state: dict[str, Tensor], block: int = 32) -> dict[str, Tensor]:
    """A checkpoint's tensors with every matrix of the layers in FP8."""
    stored = dict(state)
    for name, tensor in state.items():
        if ".layers." in name and tensor.ndim == 2:
            rows, columns = (-(-size // block) for size in tensor.shape)
            padded = torch.zeros(rows * block, columns * block)
            padded[: tensor.shape[0], : tensor.shape[1]] = tensor
            scales = padded.view(rows, block, columns, block).abs().amax((1, 3)) / 448
            whole = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)
            stored[name] = (padded / whole)[: tensor.shape[0], : tensor.shape[1]].to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scales
    return stored
