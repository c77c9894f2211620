"""Evaluation during a training without side effects on it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from minitron.device import random_devices


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode inside the context, and restore each module's mode on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """`evaluating`, and restore the random states of Python, numpy and torch on exit."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=random_devices()), evaluating(model):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
