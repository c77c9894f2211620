"""Why a candidate did not finish, in one line, with a remedy if one is known."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

from ray.exceptions import (
    ActorDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
)

from minitron.architecture import Architecture
from minitron.errors import InputError, MinitronError, NonFiniteError, TakenOverError

_NO_MODULE = re.compile(r"No module named '([\w.]+)'")
MAX_LENGTH = 400  # characters of a reason, without its remedy
LESS_MEMORY = (
    "lower micro_batch_rows, use activation checkpointing, run fewer workers or trials at once, shard, or use a machine with "
    "more memory"
)


def not_retryable() -> tuple[type[Exception], ...]:
    """Errors that a second attempt would raise again."""
    return NonFiniteError, InputError, TakenOverError, *out_of_gpu_memory()


def out_of_gpu_memory() -> tuple[type[Exception], ...]:
    """torch's error, or nothing in a process that has not imported torch, whose import takes a second."""
    error = getattr(sys.modules.get("torch"), "OutOfMemoryError", None)
    return (error,) if error else ()


def cause(error: BaseException) -> BaseException:
    """The exception that a worker raised, unwrapped from Ray's own exceptions; an InputError for a package that it lacks."""
    # Ray Train wraps what a worker's function raised, the error of a worker that died, and that of its own controller
    for name in ("controller_failure", "_base_exc", "health_check_failure"):
        error = getattr(error, name, error)
    error = error.cause if isinstance(error, RayTaskError) else error
    # Ray's own error if the worker could not even read what it was sent
    missing = isinstance(error, ModuleNotFoundError | RaySystemError) and _NO_MODULE.search(str(error))
    if missing:
        return InputError(
            f"a worker's node lacks the Python package {missing[1].partition('.')[0]}",
            "install the same packages on all nodes of the cluster",
        )
    return error


def first_cause(failures: Mapping[int, BaseException]) -> tuple[list[int], BaseException]:
    """The ranks that failed first and their error, from the errors of the workers of one training, by rank.

    When one process fails, the collective operations of the others raise RuntimeError with Gloo, and errors of
    torch.distributed's own with NCCL: these are not the cause.
    """
    causes = {rank: cause(failure) for rank, failure in sorted(failures.items())}
    own: tuple[type[BaseException], ...] = (MinitronError, *not_retryable())
    for kinds in (own, (RayActorError,)):
        if ranks := [rank for rank, error in causes.items() if isinstance(error, kinds)]:
            return ranks, causes[ranks[0]]
    others = [rank for rank, error in causes.items() if not _is_of_the_group(error)]
    ranks = [*others, *causes][:1]
    return ranks, causes[ranks[0]]


def _is_of_the_group(error: BaseException) -> bool:
    own = getattr(sys.modules.get("torch.distributed"), "DistError", None)
    return type(error) is RuntimeError or (own is not None and isinstance(error, own))


def reason(error: BaseException) -> str:
    """Why a trial failed, in one line."""
    error = cause(error)
    text = " ".join(str(error).split())
    remedy = ""
    if isinstance(error, MinitronError):
        text = error.problem
        remedy = error.remedy
    elif isinstance(error, out_of_gpu_memory()):
        text = f"out of GPU memory: {'. '.join(text.split('. ')[:2])}"
        remedy = LESS_MEMORY
    elif isinstance(error, MemoryError):
        text = "out of memory"
        remedy = LESS_MEMORY
    elif isinstance(error, OutOfMemoryError) or (isinstance(error, RayError) and "low on memory" in text):
        text = "its worker was killed because the node ran out of memory"
        remedy = LESS_MEMORY
    elif isinstance(error, RayError) and "node has died" in text:
        text = "its node died"
    elif isinstance(error, ActorDiedError):
        text = "its process was killed or crashed"
        remedy = f"if the system killed it because it used too much memory: {LESS_MEMORY}"
    else:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = " ".join(text.split())[:MAX_LENGTH]
    return f"{text}; {' '.join(remedy.split())}" if remedy else text


def table(failures: Mapping[Architecture, str]) -> str:
    """A line per candidate: its sizes and the reason."""
    width = max((len(str(architecture)) for architecture in failures), default=0)
    return "".join(f"\n  {architecture!s:<{width}}  {why}" for architecture, why in failures.items())
