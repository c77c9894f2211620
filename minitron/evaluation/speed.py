"""Forward speed of models, measured in turns so that a machine's drift hits all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from minitron.errors import InputError
from minitron.evaluation.mode import evaluating

MIN_PASSES = 5
MAX_PASSES = 200  # of a model so small that more would make its median no surer


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
    """Prefill tokens per second of one model on its own device; see `interleaved_throughput`."""
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
    """Prefill tokens per second of each model, one pass each in turn (A B C A B C ...).

    A pass is what a server does with a prompt: the whole decoder over random token ids [batch_rows, seq_length], and
    the head at the last position alone. `seconds` is for each model, never fewer than 5 passes nor more than 200,
    after two warm-up passes. Every model runs on its own device, in its own dtype; `progress(done, total)` counts rounds.
    The global random state is left alone. Raises InputError when seq_length is beyond what a model takes.
    """
    if not models:
        raise InputError("models: none given", "name at least one model")
    if seq_length < 1 or batch_rows < 1 or seconds <= 0:
        raise InputError(
            f"seq_length {seq_length}, batch_rows {batch_rows}, seconds {seconds}", "each must be greater than zero"
        )
    for name, model in models.items():
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and seq_length > longest:
            raise InputError(f"seq_length {seq_length}: model {name!r} takes {longest} at most", "lower seq_length")

    generator = torch.Generator().manual_seed(0)
    ids = {
        name: torch.randint(model.config.vocab_size, (batch_rows, seq_length), generator=generator).to(model.device)
        for name, model in models.items()
    }
    for name, model in models.items():
        _timed_pass(model, ids[name])  # first call: kernels chosen, memory allocated
    one_round = sum(_timed_pass(model, ids[name]) for name, model in models.items())
    rounds = min(MAX_PASSES, max(MIN_PASSES, math.ceil(seconds * len(models) / one_round)))

    times: dict[str, list[float]] = {name: [] for name in models}
    for done in range(1, rounds + 1):
        for name, model in models.items():
            times[name].append(_timed_pass(model, ids[name]))
        if progress is not None:
            progress(done, rounds)
    return {name: _summary(times[name], batch_rows, seq_length) for name in models}


def _timed_pass(model: Any, ids: torch.Tensor) -> float:
    with torch.inference_mode(), evaluating(model):
        _wait(ids.device)
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        _wait(ids.device)
        return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    # An accelerator answers before it has finished; a clock read then would time the launch alone.
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _summary(times: list[float], batch_rows: int, seq_length: int) -> Throughput:
    speeds = [batch_rows * seq_length / seconds for seconds in times]
    low, median, high = statistics.quantiles(speeds, n=4, method="inclusive")
    return Throughput(median, high - low, len(speeds), batch_rows, seq_length)
