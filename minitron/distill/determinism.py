"""Kernels whose results do not depend on the order in which a GPU's threads finish."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minitron.environment import environment_variables

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def allow_deterministic_products() -> None:
    """Let products of matrices on GPUs be deterministic in this process. To be called before its first one.

    PyTorch looks at the variable in a process's first product on a GPU, and without it refuses deterministic ones from then on
    (alertCuBLASConfigNotDeterministic).
    """
    os.environ.update(_workspace())


@contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Within the block PyTorch uses deterministic kernels, and raises RuntimeError for an operation that has none. CPUs need
    no other kernels: nothing changes there.

    Products of matrices also need `allow_deterministic_products`, unless nothing was multiplied before the block.
    """
    if device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with environment_variables(_workspace()):
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _workspace() -> dict[str, str]:
    """The setting of cuBLAS that PyTorch asks for, unless it is set."""
    return {} if CUBLAS_WORKSPACE in os.environ else {CUBLAS_WORKSPACE: ":4096:8"}
