"""The choice of attention kernels and masks for packed rows.

| positions attend to | CPU | CUDA |
|---|---|---|
| all earlier ones | scaled_dot_product_attention, causal | the same: 1.5 times faster than flex_attention |
| a window, a document, soft-capped scores | scaled_dot_product_attention or eager, dense mask | flex_attention, no mask |
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from minitron.attention.interface import PREFIX, is_own, plain_causal, use_own_attention
from minitron.attention.masks import block_mask, dense_mask
from minitron.config_values import declared
from minitron.data.boundaries import DocumentBoundaries
from minitron.errors import InputError

Kernel = Literal["flex", "dense"]
"""Kernels for attention that is not plainly causal: flex_attention, or a kernel with a dense mask."""


def chosen_kernel(device: torch.device) -> Kernel:
    """flex_attention on CUDA. On CPUs it has no backward pass and keeps all scores in memory."""
    return "flex" if device.type == "cuda" else "dense"


def row_arguments(
    model: Any, input_ids: Tensor, documents: DocumentBoundaries | None = None, kernel: Kernel | None = None
) -> dict[str, Any]:
    """Arguments for the decoder of a transformers model on rows without padding, int64 [rows, seq_length]: masks, and with
    `documents` positions that restart in each document (except with longrope), so that documents do not attend to each other.

    kernel: by default the one for the tokens' device. Raises InputError for `documents` with an attention implementation
    that was chosen explicitly, and for layers with attention other than full and sliding.
    """
    config = model.config
    use_own_attention(config)
    if not is_own(config):
        if documents is None:
            return {}  # transformers' own masks
        raise InputError(
            f"{config.model_type} with attention implementation {config._attn_implementation!r} cannot keep documents apart",
            "load the model without attn_implementation, or let the documents of a row attend to each other",
        )
    kernel = kernel or chosen_kernel(input_ids.device)
    numbers = documents.numbers(input_ids) if documents else None
    dtype = next(model.parameters()).dtype
    masks = {
        kind: _mask(config, dtype, input_ids, window, numbers, kernel) for kind, window in _windows(config).items()
    }
    arguments: dict[str, Any] = {"attention_mask": masks.get("", masks)}
    if documents and short_length(config) is None:
        arguments["position_ids"] = documents.positions(input_ids)
    return arguments


def short_length(config: Any) -> int | None:
    """Number of positions up to which rotary embeddings have other factors than beyond (longrope), or None.

    transformers chooses by the largest position of a batch. With positions that restart, a row's factors would depend on the
    documents of the rows beside it. Within a document only distances count, so that positions in the row do as well.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    return int(rope["original_max_position_embeddings"]) if rope.get("rope_type") == "longrope" else None


def _windows(config: Any) -> dict[str, int | None]:
    """The window of each kind of layer, None for all earlier positions; the kind is "" if all layers are of the same kind."""
    window, kinds = declared(config, "sliding_window"), declared(config, "layer_types")
    if not kinds:
        return {"": window}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}


def _mask(
    config: Any, dtype: torch.dtype, input_ids: Tensor, window: int | None, documents: Tensor | None, kernel: Kernel
) -> Any:
    rows, seq_length = input_ids.shape
    if window is not None and seq_length <= window:
        window = None
    eager = config._attn_implementation == PREFIX + "eager"
    if window is None and documents is None and not eager:
        return plain_causal(input_ids)
    if kernel == "flex":
        return block_mask(seq_length, window, documents, input_ids.device)
    mask = dense_mask(seq_length, window, documents, input_ids.device).expand(rows, -1, -1, -1)
    if not eager:
        return mask
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return added.masked_fill_(~mask, torch.finfo(dtype).min)
