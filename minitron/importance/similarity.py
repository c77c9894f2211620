"""Cosine similarity of the residual stream between every two depths, from which Block Importance follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHUNK = 128  # positions normalised in float32 at a time


def cosine_sums(stream: Sequence[Tensor]) -> Tensor:
    """Cosines of the hidden states at every two depths, summed over positions: float64 [depths, depths].

    stream: one tensor [..., hidden] for each depth, any float dtype. Memory: depths x CHUNK x hidden float32 values, twice.
    """
    depths = [hidden.flatten(0, -2) for hidden in stream]
    total = torch.zeros(len(depths), len(depths), dtype=torch.float64, device=depths[0].device)
    for parts in zip(*[hidden.split(CHUNK) for hidden in depths], strict=True):
        unit = normalize(torch.stack(parts, dim=1).float(), dim=-1)  # [positions, depths, hidden]
        total += (unit @ unit.mT).sum(dim=0, dtype=torch.float64)
    return total
