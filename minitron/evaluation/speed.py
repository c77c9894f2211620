"""Prefill speed of models, measured in alternation so that changes in the machine's speed affect all of them equally."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from minitron.arguments import check_model, check_type
from minitron.device import synchronize
from minitron.errors import InputError
from minitron.evaluation.mode import evaluating
from minitron.processes import is_sharded, largest

MIN_PASSES = 5
MAX_PASSES = 200  # more passes of a small model would not make its median more precise


@dataclass(frozen=True)
class Throughput:
    """Prefill speed over `passes` timed forward passes of `batch_rows` x `seq_length` tokens."""

    tokens_per_second: float
    """Median over the passes."""
    spread: float
    """Interquartile range over the passes, tokens per second."""
    passes: int
    batch_rows: int
    seq_length: int


def throughput(
    model: Any,
    *,
    seq_length: int = 256,
    batch_rows: int = 4,
    seconds: float = 3.0,
    progress: Callable[[int, int], None] | None = None,
) -> Throughput:
    """Prefill speed of one model on its device, tokens per second; arguments and errors as in `interleaved_throughput`."""
    models = {"model": model}
    return interleaved_throughput(
        models, seq_length=seq_length, batch_rows=batch_rows, seconds=seconds, progress=progress
    )["model"]


def interleaved_throughput(
    models: Mapping[str, Any],
    *,
    seq_length: int = 256,
    batch_rows: int = 4,
    seconds: float = 3.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Throughput]:
    """Prefill speed of several models, tokens per second, with one pass of each in turn (A B C A B C ...): {name: Throughput}.

    A pass does what a server does with a prompt: the decoder over random token ids [batch_rows, seq_length], and the head at
    the last position only. seconds: measuring time for each model, after two warm-up passes; at least 5 and at most 200
    passes. Every model runs on its device and in its dtype. If one is sharded, all its processes call this, and the speed is
    that of one of them. `progress(done, total)` counts rounds. The global random state is
    not changed. Raises InputError for a seq_length that exceeds a model's context, and for arguments of the wrong type.
    """
    check_type("models", models, Mapping, "a dict of names and models")
    if not models:
        raise InputError("models: empty", "give at least one model")
    for name, model in models.items():
        check_model(f"models[{name!r}]", model)
    if seq_length < 1 or batch_rows < 1 or seconds <= 0:
        raise InputError(
            f"seq_length {seq_length}, batch_rows {batch_rows}, seconds {seconds}", "each must be greater than zero"
        )
    for name, model in models.items():
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and seq_length > longest:
            raise InputError(
                f"seq_length: {seq_length} exceeds the context of model {name!r}, {longest} tokens", "lower seq_length"
            )

    generator = torch.Generator().manual_seed(0)
    ids = {
        name: torch.randint(model.config.vocab_size, (batch_rows, seq_length), generator=generator).to(model.device)
        for name, model in models.items()
    }
    for name, model in models.items():
        _timed_pass(model, ids[name])  # the first call selects kernels and allocates memory
    one_round = sum(_timed_pass(model, ids[name]) for name, model in models.items())
    rounds = min(MAX_PASSES, max(MIN_PASSES, math.ceil(seconds * len(models) / one_round)))
    if any(is_sharded(model) for model in models.values()):
        rounds = largest([rounds])[0]

    times: dict[str, list[float]] = {name: [] for name in models}
    for done in range(1, rounds + 1):
        for name, model in models.items():
            times[name].append(_timed_pass(model, ids[name]))
        if progress is not None:
            progress(done, rounds)
    return {name: _summary(times[name], batch_rows, seq_length) for name in models}


def _timed_pass(model: Any, ids: torch.Tensor) -> float:
    with torch.inference_mode(), evaluating(model):
        synchronize(ids.device)
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        synchronize(ids.device)
        return time.perf_counter() - start


def _summary(times: list[float], batch_rows: int, seq_length: int) -> Throughput:
    speeds = [batch_rows * seq_length / seconds for seconds in times]
    low, median, high = statistics.quantiles(speeds, n=4, method="inclusive")
    return Throughput(median, high - low, len(speeds), batch_rows, seq_length)
