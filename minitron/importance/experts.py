"""Activations and outputs of each expert of a mixture-of-experts layer for the tokens routed to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


def routed(
    experts: Any, hidden: Tensor, index: Tensor, weights: Tensor, *, pre_activation: bool
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield (expert, tokens int64 [n], neurons [n, width], norms float32 [n]) for every expert with at least one token.

    experts: a transformers module with the fused parameters gate_up_proj [experts, 2 · width, hidden] and down_proj
    [experts, hidden, width]. hidden: [tokens, hidden]. index, weights: the router's experts, int64 [tokens, k], and their
    weights [tokens, k]. `neurons` are act(gate) · up, or gate before the activation; `norms` the L2 norm of the output times
    its router weight. They are computed here because the forward pass of fused experts exposes neither.
    """
    for expert in torch.unique(index).tolist():
        if expert >= len(experts.gate_up_proj):
            continue  # transformers marks a token without an expert with an index beyond the last one
        tokens, choice = torch.where(index == expert)
        gate, up = linear(hidden[tokens], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        active = experts.act_fn(gate) * up
        output = linear(active, experts.down_proj[expert]) * weights[tokens, choice, None]
        yield expert, tokens, gate if pre_activation else active, output.float().norm(dim=-1)
