"""lm-eval without its progress bars and messages, and with the random numbers that it usually has."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import lm_eval.api.task
import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

WITH_BARS = (lm_eval.api.task.__name__, "lm_eval.api.model", "lm_eval.models.huggingface")  # the others are large


class _NoBar(tqdm):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "disable": True})


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and messages below error level of lm-eval and datasets inside the context."""
    modules: list[Any] = [sys.modules[name] for name in WITH_BARS if name in sys.modules]
    bars = [module.tqdm for module in modules]
    logger = logging.getLogger("lm_eval")
    level = logger.level
    had_bars = not datasets.are_progress_bars_disabled()
    for module in modules:
        module.tqdm = _NoBar
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar
        logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


@contextmanager
def usual_random_state() -> Iterator[None]:
    """Seed the global random generators, which some task definitions use, as lm-eval does, and restore their states on exit."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
