"""Kernels whose results do not depend on the order in which a GPU's threads finish."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Within the block PyTorch uses deterministic kernels, and raises RuntimeError for an operation that has none. CPUs need
    no other kernels: nothing changes there.

    Products of matrices also need what `minitron.device` sets in the environment.
    """
    if device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
