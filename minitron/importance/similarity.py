"""How alike the residual stream is at every two depths: the cosine that Block Importance is read from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHUNK = 128  # positions normalised in float32 at a time


def cosine_sums(stream: Sequence[Tensor]) -> Tensor:
    """float64 [depths, depths], cosines of the hidden states at every two depths, summed over positions.

    stream: one [..., hidden] per depth, of any float dtype. Memory: depths x CHUNK x hidden float32 values, twice.
    """
    depths = [hidden.flatten(0, -2) for hidden in stream]
    total = torch.zeros(len(depths), len(depths), dtype=torch.float64, device=depths[0].device)
    for parts in zip(*[hidden.split(CHUNK) for hidden in depths], strict=True):
        unit = normalize(torch.stack(parts, dim=1).float(), dim=-1)  # [positions, depths, hidden]
        total += (unit @ unit.mT).sum(dim=0, dtype=torch.float64)
    return total
