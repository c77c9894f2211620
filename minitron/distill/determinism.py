"""Kernels whose results do not depend on the order in which a GPU's threads finish."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Within the block PyTorch uses deterministic kernels, and raises RuntimeError for an operation that has none. CPUs need
    no other kernels: nothing changes there."""
    if device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(CUBLAS_WORKSPACE)
    os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")  # which PyTorch asks for before it multiplies matrices
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if workspace is None:
            del os.environ[CUBLAS_WORKSPACE]
