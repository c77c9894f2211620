"""Why a candidate did not finish, in a line that says what to do where that is known."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from minitron.errors import InputError, MinitronError, NonFiniteError

LONGEST = 400
# What would happen again the same way.
CERTAIN = (NonFiniteError, InputError, torch.OutOfMemoryError)
LESS_MEMORY = "use smaller micro-batches or activation checkpointing, or more workers per trial and shard"


def cause(error: BaseException) -> BaseException:
    """What was raised in a worker, without what Ray wraps around it."""
    return error.cause if isinstance(error, RayTaskError) else error


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
    elif isinstance(error, RayError) and "low on memory" in text:
        text, remedy = (
            "its worker was killed because the node ran out of memory",
            f"{LESS_MEMORY}; or run fewer at once",
        )
    elif isinstance(error, RayError) and "node has died" in text:
        text = "its node died"
    elif isinstance(error, ActorDiedError):
        text, remedy = "its worker died", "the operating system kills processes that take too much memory"
    else:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = " ".join(text.split())[:LONGEST]
    return f"{text}; {' '.join(remedy.split())}" if remedy else text


def table(failures: Mapping[str, str]) -> str:
    """A line per candidate: its name and the reason."""
    width = max(map(len, failures), default=0)
    return "".join(f"\n  {name:<{width}}  {why}" for name, why in failures.items())
