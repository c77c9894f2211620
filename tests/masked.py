"""The original model with units silenced instead of removed: the reference that slicing is held against.

Written from the definition, without the project's tables: a removed neuron or head gives its output projection zero, a
removed layer is the identity, a removed channel is zero in the residual stream, and norms see the kept channels only.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from minitron.selection import Selection


def masked(model: nn.Module, kept: Selection, head_dim: int) -> nn.Module:
    """A copy of `model` whose logits are what slicing to `kept` must give."""
    result = copy.deepcopy(model).double()
    body = result.model
    body.layers = nn.ModuleList([body.layers[i] for i in kept.layers])
    for new, layer in enumerate(body.layers):
        layer.mlp.down_proj.register_forward_pre_hook(_zero_input(kept.neurons[new]))
        positions = (kept.heads[new][:, None] * head_dim + torch.arange(head_dim)).flatten()
        layer.self_attn.o_proj.register_forward_pre_hook(_zero_input(positions))
        for writer in (layer.mlp.down_proj, layer.self_attn.o_proj):
            writer.register_forward_hook(_zero_output(kept.hidden))
        layer.input_layernorm = _OnKept(layer.input_layernorm, kept.hidden)
        layer.post_attention_layernorm = _OnKept(layer.post_attention_layernorm, kept.hidden)
    body.embed_tokens.register_forward_hook(_zero_output(kept.hidden))
    body.norm = _OnKept(body.norm, kept.hidden)
    return result


class _OnKept(nn.Module):
    """A norm whose statistics come from the kept channels; the others leave as zero."""

    def __init__(self, norm: nn.Module, kept: torch.Tensor) -> None:
        super().__init__()
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        self.kept = kept
        self.norm = type(norm)(len(kept), eps=eps).double()
        for name, parameter in norm.named_parameters():
            getattr(self.norm, name).data = parameter.data[kept]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden)
        result[..., self.kept] = self.norm(hidden[..., self.kept])
        return result


def _only(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(values.shape[-1], dtype=values.dtype)
    mask[kept] = 1
    return values * mask


def _zero_input(kept: torch.Tensor):
    return lambda _module, arguments: (_only(arguments[0], kept), *arguments[1:])


def _zero_output(kept: torch.Tensor):
    return lambda _module, _arguments, output: _only(output, kept)
