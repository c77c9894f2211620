"""Speed of models in prefill and decoding, measured in alternation so that changes in the machine's speed affect all of them
equally."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from minitron.arguments import check_model, check_type
from minitron.device import synchronize
from minitron.errors import InputError
from minitron.evaluation.mode import evaluating
from minitron.kv_cache import cache_of, with_cache
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


@dataclass(frozen=True)
class TokenLatency:
    """Time of a decoding step of `batch_rows` sequences with `context` tokens, over `passes` steps."""

    seconds: float
    """Median over the passes."""
    spread: float
    """Interquartile range over the passes, seconds."""
    passes: int
    batch_rows: int
    context: int


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
    _check(models, seq_length, batch_rows, seconds)
    ids = _random_ids(models, batch_rows, seq_length)
    times = _alternate(
        {name: partial(_prefill, model, ids[name]) for name, model in models.items()}, models, seconds, progress
    )
    speeds = {name: [batch_rows * seq_length / each for each in own] for name, own in times.items()}
    return {
        name: Throughput(*_median_and_spread(own), len(own), batch_rows, seq_length) for name, own in speeds.items()
    }


def interleaved_token_latency(
    models: Mapping[str, Any],
    *,
    context: int = 256,
    batch_rows: int = 4,
    seconds: float = 3.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, TokenLatency]:
    """Time between two tokens that several models generate, with one step of each in turn: {name: TokenLatency}.

    A step computes the last of `context` tokens of `batch_rows` sequences; the keys and values of the others are in the KV
    cache. All caches are in memory together. Arguments and errors as in `interleaved_throughput`.
    """
    _check(models, context, batch_rows, seconds)
    ids = _random_ids(models, batch_rows, context)
    caches = {name: _filled_cache(model, ids[name][:, :-1]) for name, model in models.items()}
    steps = {name: partial(_decode, model, ids[name][:, -1:], caches[name]) for name, model in models.items()}
    times = _alternate(steps, models, seconds, progress)
    return {name: TokenLatency(*_median_and_spread(own), len(own), batch_rows, context) for name, own in times.items()}


def _check(models: Mapping[str, Any], length: int, batch_rows: int, seconds: float) -> None:
    check_type("models", models, Mapping, "a dict of names and models")
    if not models:
        raise InputError("models: empty", "give at least one model")
    for name, model in models.items():
        check_model(f"models[{name!r}]", model)
    if length < 1 or batch_rows < 1 or seconds <= 0:
        raise InputError(
            f"seq_length {length}, batch_rows {batch_rows}, seconds {seconds}", "each must be greater than zero"
        )
    for name, model in models.items():
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and length > longest:
            raise InputError(
                f"seq_length: {length} exceeds the context of model {name!r}, {longest} tokens", "lower seq_length"
            )


def _random_ids(models: Mapping[str, Any], batch_rows: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(model.config.vocab_size, (batch_rows, length), generator=generator).to(model.device)
        for name, model in models.items()
    }


def _alternate(
    passes: Mapping[str, Callable[[], float]],
    models: Mapping[str, Any],
    seconds: float,
    progress: Callable[[int, int], None] | None,
) -> dict[str, list[float]]:
    """The seconds of every pass, which return them, after two warm-up rounds."""
    for timed in passes.values():
        timed()  # the first call selects kernels and allocates memory
    one_round = sum(timed() for timed in passes.values())
    rounds = min(MAX_PASSES, max(MIN_PASSES, math.ceil(seconds * len(passes) / one_round)))
    if any(is_sharded(model) for model in models.values()):
        rounds = largest([rounds])[0]
    times: dict[str, list[float]] = {name: [] for name in passes}
    for done in range(1, rounds + 1):
        for name, timed in passes.items():
            times[name].append(timed())
        if progress is not None:
            progress(done, rounds)
    return times


def _timed_pass(model: Any, ids: torch.Tensor, **cache: Any) -> float:
    """Seconds of a forward pass. cache: the model's arguments about its KV cache."""
    with torch.inference_mode(), evaluating(model):
        synchronize(ids.device)
        start = time.perf_counter()
        model(input_ids=ids, logits_to_keep=1, **cache)
        synchronize(ids.device)
        return time.perf_counter() - start


def _prefill(model: Any, ids: torch.Tensor) -> float:
    return _timed_pass(model, ids, use_cache=False)


def _filled_cache(model: Any, ids: torch.Tensor) -> Any:
    """The keys and values of all tokens but the last one; None for no tokens."""
    if not ids.shape[1]:
        return None
    with torch.inference_mode(), evaluating(model):
        return cache_of(model(input_ids=ids, use_cache=True, logits_to_keep=1))


def _decode(model: Any, token: torch.Tensor, cache: Any) -> float:
    layers = [] if cache is None else cache.layers
    before = [dict(vars(layer)) for layer in layers]  # a step makes new tensors of keys and values
    taken = _timed_pass(model, token, **with_cache(cache))
    for layer, state in zip(layers, before, strict=True):
        vars(layer).update(state)
    return taken


def _median_and_spread(values: list[float]) -> tuple[float, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, high - low
