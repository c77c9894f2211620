"""Measurements of several engines in turns, so that changes in the machine's speed affect all of them equally."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from minitron.errors import InputError
from minitron.throughput.engine import Engine, Request, Workload


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Throughput:
    """The speed of one model on one workload; None is what a failure, or the engine, leaves unknown."""

    model: str
    engine: str
    workload: Workload
    rounds: int
    """Batches that were measured."""
    failure: str | None = None
    """Why the workload could not be run."""
    input_tokens: float | None = None
    """Mean length of the prompts, which a server counts in its own tokens."""
    output_tokens: float | None = None
    """Mean length of the answers, which are shorter if a server ends them early."""
    requests_per_second: Spread | None = None
    output_tokens_per_second: Spread | None = None
    tokens_per_second: Spread | None = None
    """Tokens of prompts and answers together."""
    first_token_seconds: Spread | None = None
    """From sending a request to its first token, the median of a batch."""
    inter_token_seconds: Spread | None = None
    """Between two tokens of an answer: (last - first) / (tokens - 1), the median of a batch; None for answers of one token."""
    memory_bytes: int | None = None
    ratio: Spread | None = None
    """Output tokens per second divided by those of the first model in the same round; None for the first model."""


def measure(
    engines: Mapping[str, Engine] | Sequence[tuple[str, Engine]],
    workloads: Sequence[Workload],
    *,
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> list[Throughput]:
    """Measure each workload on each engine, one batch of each in turn (A B A B ...), `rounds` times after a warm-up.

    engines: by the model's name, or pairs of a name and an engine, so that a model can have several; ratios are to the first
    one. A workload that does not fit in an engine's memory is reported as a failure of that model. `progress(done, total)`
    counts rounds. Raises InputError for workloads that exceed a model's context, and what the engines raise.
    """
    if not engines or not workloads:
        raise InputError("no model or no workload to measure", "give at least one of each")
    if rounds < 1:
        raise InputError(f"rounds: {rounds} is less than 1", "give 1 or more")
    measured = list(engines.items() if isinstance(engines, Mapping) else engines)
    for name, engine in measured:
        for workload in workloads:
            tokens = workload.input_tokens + workload.output_tokens
            if engine.longest is not None and tokens > engine.longest:
                raise InputError(
                    f"{name}: {workload.input_tokens} + {workload.output_tokens} tokens exceed its context of "
                    f"{engine.longest:,}",
                    "give shorter prompts or answers",
                )
    results = []
    for number, workload in enumerate(workloads):
        failures: dict[int, str] = {}
        batches: list[list[Sequence[Request]]] = [[] for _ in measured]
        for turn in range(rounds + 1):
            for index, (_, engine) in enumerate(measured):
                if index in failures:
                    continue
                try:
                    if turn:
                        batches[index].append(engine.run(workload, seed=turn))
                    else:
                        engine.warm_up(workload)
                except torch.OutOfMemoryError:
                    failures[index] = "out of memory"
                    torch.cuda.empty_cache()
            if progress is not None and turn:
                progress(number * rounds + turn, len(workloads) * rounds)
        for index, (name, engine) in enumerate(measured):
            if index in failures:
                results.append(Throughput(name, engine.kind, workload, rounds, failure=failures[index]))
                continue
            base = None if index == 0 or 0 in failures else batches[0]
            results.append(_throughput(name, engine, workload, batches[index], base))
    return results


def _throughput(
    name: str,
    engine: Engine,
    workload: Workload,
    batches: Sequence[Sequence[Request]],
    reference: Sequence[Sequence[Request]] | None,
) -> Throughput:
    requests = [request for batch in batches for request in batch]
    several = [batch for batch in batches if all(request.output_tokens > 1 for request in batch)]
    seconds = [max(request.last for request in batch) for batch in batches]
    taken = list(zip(batches, seconds, strict=True))
    return Throughput(
        model=name,
        engine=engine.kind,
        workload=workload,
        rounds=len(batches),
        input_tokens=statistics.fmean(request.input_tokens for request in requests),
        output_tokens=statistics.fmean(request.output_tokens for request in requests),
        requests_per_second=Spread.of([len(batch) / time for batch, time in taken]),
        output_tokens_per_second=Spread.of(_output_speeds(batches)),
        tokens_per_second=Spread.of(
            [sum(r.input_tokens + r.output_tokens for r in batch) / time for batch, time in taken]
        ),
        first_token_seconds=Spread.of([statistics.median(request.first for request in batch) for batch in batches]),
        inter_token_seconds=Spread.of([statistics.median(map(_between, batch)) for batch in several])
        if several
        else None,
        memory_bytes=engine.memory(),
        ratio=None
        if reference is None
        else Spread.of([a / b for a, b in zip(_output_speeds(batches), _output_speeds(reference), strict=True)]),
    )


def _output_speeds(batches: Sequence[Sequence[Request]]) -> list[float]:
    """Output tokens per second of each batch."""
    return [
        sum(request.output_tokens for request in batch) / max(request.last for request in batch) for batch in batches
    ]


def _between(request: Request) -> float:
    return (request.last - request.first) / (request.output_tokens - 1)
