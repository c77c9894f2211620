"""Evaluation in the middle of something else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and each back in the mode it had on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """`evaluating`, and the random states of Python, numpy and torch are put back on leaving."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), evaluating(model):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
