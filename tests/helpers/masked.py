"""The original model with units masked instead of removed: the reference for slicing.

Written from the definition, without the project's family tables: the input of the output projection is zero for a removed
neuron or head, the router logit of a removed expert is minus infinity, a removed layer is skipped, a removed channel is zero in
the residual stream, and norms use the kept channels only.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from minitron.pruning.selection import Selection


def masked(model: nn.Module, kept: Selection, head_dim: int) -> nn.Module:
    """A copy of `model` whose logits are those that slicing to `kept` has to give."""
    result = copy.deepcopy(model).double()
    body = result.model
    body.layers = nn.ModuleList([body.layers[i] for i in kept.layers])
    result.config.num_hidden_layers = len(kept.layers)
    if getattr(result.config, "layer_types", None):
        result.config.layer_types = [result.config.layer_types[i] for i in kept.layers]
    for new, layer in enumerate(body.layers):
        positions = (kept.heads[new][:, None] * head_dim + torch.arange(head_dim)).flatten()
        layer.self_attn.o_proj.register_forward_pre_hook(_zero_input(positions))
        if hasattr(layer.mlp, "experts"):
            layer.mlp.gate = _Router(layer.mlp.gate, kept.experts[new])
            _silence_neurons(layer.mlp.experts, kept.experts[new], kept.neurons[new])
        else:
            layer.mlp.down_proj.register_forward_pre_hook(_zero_input(kept.neurons[new]))
        for writer in (layer.mlp, layer.self_attn.o_proj):
            writer.register_forward_hook(_zero_output(kept.hidden))
        for name, module in list(layer.named_children()):
            if name.endswith("layernorm"):
                setattr(layer, name, _OnKept(module, kept.hidden))
    body.embed_tokens.register_forward_hook(_zero_output(kept.hidden))
    body.norm = _OnKept(body.norm, kept.hidden)
    return result


class _OnKept(nn.Module):
    """A norm over the kept channels alone; the others are zero in its output."""

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


class _Router(nn.Module):
    """Top-k routing by softmax, with logits of minus infinity for removed experts."""

    def __init__(self, router: nn.Module, kept: torch.Tensor) -> None:
        super().__init__()
        self.router, self.kept = router, kept

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        every = hidden @ self.router.weight.T
        logits = torch.full_like(every, float("-inf"))
        logits[:, self.kept] = every[:, self.kept]
        weights, experts = logits.float().softmax(dim=-1).topk(self.router.top_k, dim=-1)
        if getattr(self.router, "norm_topk_prob", True):
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights, experts


def _silence_neurons(experts: nn.Module, kept: torch.Tensor, neurons: torch.Tensor) -> None:
    for expert, own in zip(kept.tolist(), neurons, strict=True):
        experts.down_proj.data[expert] = _only(experts.down_proj.data[expert], own)


def _only(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(values.shape[-1], dtype=values.dtype)
    mask[kept] = 1
    return values * mask


def _zero_input(kept: torch.Tensor):
    return lambda _module, arguments: (_only(arguments[0], kept), *arguments[1:])


def _zero_output(kept: torch.Tensor):
    return lambda _module, _arguments, output: _only(output, kept)
