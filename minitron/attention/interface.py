"""Attention functions for transformers that also accept flex_attention's block masks and "plain causal".

transformers builds its masks in the model and waits for the GPU while it does (`find_packed_sequence_indices`). Here the
caller passes the mask, and each layer uses the one of its kind, also when it is recomputed in the backward pass. All other
callers of the model (generation, benchmarks with padding) get transformers' own masks and functions.
"""

from __future__ import annotations

import logging
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from minitron.config_values import declared
from minitron.model_imports import import_models

PREFIX = "minitron_"
WRAPPED = ("sdpa", "eager")  # the implementations of transformers that are wrapped
# Kernels that a process keeps: for teacher and student, with and without gradients, each number of rows and kind of mask.
KERNELS = 128

log = logging.getLogger(__name__)


def use_own_attention(config: Any) -> None:
    """Let a model with this transformers config accept masks of `minitron.attention`, and apply its soft-capping.

    The implementation is not changed if it was chosen explicitly (FlashAttention, transformers' flex_attention), or if the
    model has layers that are neither causal over all positions nor over a sliding window.
    """
    name = config._attn_implementation
    if name == "sdpa" and softcap_of(config):  # transformers 5.17 chooses sdpa, which does not soft-cap
        name = "eager"
    if name in WRAPPED and _is_causal(config):
        _register()
        config._attn_implementation = PREFIX + name


def takes_masks(config: Any) -> bool:
    """Whether the layers of a model with this transformers config accept a dense mask from the caller."""
    return (config._attn_implementation or "").removeprefix(PREFIX) in WRAPPED


def is_own(config: Any) -> bool:
    """Whether `use_own_attention` changed the implementation."""
    return takes_masks(config) and config._attn_implementation.startswith(PREFIX)


def softcap_of(config: Any) -> float | None:
    """The value at which attention scores are soft-capped, or None. Gemma 3's config has the key, but its layers ignore it."""
    return getattr(config, "attn_logit_softcapping", None) if config.model_type == "gemma2" else None


def _is_causal(config: Any) -> bool:
    kinds = set(declared(config, "layer_types") or ())
    return kinds <= {"full_attention", "sliding_attention"} and not declared(config, "use_bidirectional_attention")


@lru_cache
def _register() -> None:
    import_models()
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name, function in (("sdpa", _sdpa), ("eager", _eager)):
        ALL_ATTENTION_FUNCTIONS.register(PREFIX + name, function)
        ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def plain_causal(like: Tensor) -> Tensor:
    """The mask of a plainly causal layer: an empty tensor, with which models build no mask and kernels read none."""
    return like.new_empty((1, 1, 0, 0))


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **named: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if isinstance(attention_mask, BlockMask):
        return _flex(query, key, value, attention_mask, **named)
    if attention_mask is not None and attention_mask.numel() == 0:
        attention_mask = None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **named)


def _eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **named: Any) -> Any:
    if isinstance(attention_mask, BlockMask):
        return _flex(query, key, value, attention_mask, **named)
    family = sys.modules[type(module).__module__]
    return family.eager_attention_forward(module, query, key, value, attention_mask, **named)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float, softcap: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Attention of [rows, heads, seq_length, head_dim] with flex_attention: [rows, seq_length, heads, head_dim]."""

    def capped(score: Tensor, row: Any, head: Any, position: Any, other: Any) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    options: dict[str, Any] = {
        "score_mod": None if softcap is None else capped,
        "block_mask": mask,
        "scale": scaling,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    if torch.compiler.is_compiling() or not query.is_cuda:
        attended = flex_attention(query, key, value, **options)
    else:
        attended = _fused(query, key, value, **options)
    return attended.transpose(1, 2).contiguous(), None


def _fused(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """flex_attention as a kernel. All are dropped before there is one more than KERNELS, as where a process scores the
    candidates of a search."""
    from torch._dynamo import config, reset
    from torch._dynamo.exc import FailOnRecompileLimitHit

    with config.patch(recompile_limit=KERNELS):
        try:
            return _compiled()(query, key, value, **options)
        except FailOnRecompileLimitHit:
            log.warning("flex_attention has %d kernels in this process; they are dropped and compiled anew", KERNELS)
            reset()
            return _compiled()(query, key, value, **options)


@lru_cache
def _compiled() -> Any:
    # fullgraph: beyond the limit an error; without it further ones would run unfused, with all scores in memory
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)
