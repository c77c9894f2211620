"""Why a candidate did not finish, in a line that says what to do where that is known."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from minitron.architecture import Architecture
from minitron.errors import InputError, MinitronError, NonFiniteError

LONGEST = 400
# What a second attempt would meet again.
NOT_RETRYABLE = (NonFiniteError, InputError, torch.OutOfMemoryError)
LESS_MEMORY = (
    "lower micro_batch_rows, use activation checkpointing, run fewer workers or trials at once, shard, or use a machine with "
    "more memory"
)


def cause(error: BaseException) -> BaseException:
    """What was raised in a worker, without what Ray wraps around it."""
    if isinstance(error, RayTaskError):
        return error.cause
    # Ray Train wraps what a worker's function raised, and a worker that does not answer because it is dead
    for name in ("_base_exc", "health_check_failure"):
        error = getattr(error, name, error)
    return error


def first_cause(failures: Mapping[int, BaseException]) -> tuple[list[int], BaseException]:
    """The ranks and the error that started it, from what the workers of one training raised, by rank.

    When one process fails, the collectives of the others raise RuntimeError.
    """
    causes = {rank: cause(failure) for rank, failure in sorted(failures.items())}
    for kinds in ((MinitronError, *NOT_RETRYABLE), (RayActorError,)):
        if ranks := [rank for rank, error in causes.items() if isinstance(error, kinds)]:
            return ranks, causes[ranks[0]]
    telling = [rank for rank, error in causes.items() if type(error) is not RuntimeError]
    ranks = [*telling, *causes][:1]
    return ranks, causes[ranks[0]]


def reason(error: BaseException) -> str:
    """One line for what ended a trial."""
    error = cause(error)
    text = " ".join(str(error).split())
    remedy = ""
    if isinstance(error, MinitronError):
        text, remedy = error.problem, error.remedy
    elif isinstance(error, torch.OutOfMemoryError):
        text, remedy = f"out of GPU memory: {'. '.join(text.split('. ')[:2])}", LESS_MEMORY
    elif isinstance(error, MemoryError):
        text, remedy = "out of memory", LESS_MEMORY
    elif isinstance(error, OutOfMemoryError) or (isinstance(error, RayError) and "low on memory" in text):
        text, remedy = (
            "its worker was killed because the node ran out of memory",
            LESS_MEMORY,
        )
    elif isinstance(error, RayError) and "node has died" in text:
        text = "its node died"
    elif isinstance(error, ActorDiedError):
        text = "its process was killed or crashed"
        remedy = f"if the system killed it because it took too much memory: {LESS_MEMORY}"
    else:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = " ".join(text.split())[:LONGEST]
    return f"{text}; {' '.join(remedy.split())}" if remedy else text


def table(failures: Mapping[Architecture, str]) -> str:
    """A line per candidate: its name and the reason."""
    width = max((len(str(architecture)) for architecture in failures), default=0)
    return "".join(f"\n  {architecture!s:<{width}}  {why}" for architecture, why in failures.items())
