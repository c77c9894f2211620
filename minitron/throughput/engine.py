"""What an engine is: something that answers several prompts at once and says when the tokens came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from minitron.errors import InputError


@dataclass(frozen=True)
class Workload:
    """`batch` requests at a time, each with a prompt of `input_tokens` and an answer of `output_tokens`."""

    input_tokens: int
    output_tokens: int
    batch: int = 1

    def __post_init__(self) -> None:
        if min(self.input_tokens, self.output_tokens, self.batch) < 1:
            raise InputError(f"workload {self}: less than 1", "give lengths and a batch of 1 or more")

    def __str__(self) -> str:
        return f"{self.input_tokens}/{self.output_tokens} x {self.batch}"


@dataclass(frozen=True)
class Request:
    """One answered request. Times are in seconds since all requests of the batch were sent."""

    input_tokens: int
    output_tokens: int
    first: float
    """When the first token came."""
    last: float
    """When the last one came."""


class Engine(Protocol):
    """A loaded model that generates text greedily, and goes on after an end-of-text token where it can."""

    kind: str
    """Kind of engine, for tables: "transformers", "vllm" or "server"."""
    longest: int | None
    """Number of tokens that prompt and answer may have together; None if unknown."""

    def warm_up(self, workload: Workload) -> None:
        """Answer one batch that is not measured, and learn from it what `run` needs."""

    def run(self, workload: Workload, seed: int) -> Sequence[Request]:
        """Answer one batch of random prompts, which are others for another `seed`."""

    def memory(self) -> int | None:
        """Bytes that the model needed for the last batch; None if the engine does not say."""
