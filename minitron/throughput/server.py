"""An OpenAI-compatible server as engine: one connection per request, answers timed as they arrive."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from minitron.completions import RefusedError, Served, Streamed, streamed
from minitron.errors import InputError
from minitron.throughput.engine import Request, Workload

# Prompts are of these words, in random order so that no two have a common beginning that a server keeps.
WORDS = """time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power"""
# Most servers know these; they make answers as long as requested, whatever the model would write.
UNENDED = {"ignore_eos": True}
_UNKNOWN_FIELD = (400, 422)


class ServerEngine:
    """The model of a server, which may be on another machine. Lengths are counted in its own tokens, by what it says.

    kind: name of the engine for tables. polling_seconds: for which a server on this machine occupies it after a batch; `run`
    then waits as long, so that it does not slow other models, whose turn is next.
    """

    longest: int | None = None

    def __init__(self, served: Served, kind: str = "server", polling_seconds: float = 0.0) -> None:
        self.kind = kind
        self.served = served
        self.polling_seconds = polling_seconds
        self._extra: dict[str, Any] = UNENDED
        self._session = uuid.uuid4().hex  # a server may still keep the prompts of an earlier measurement
        self._words: dict[int, int] = {}  # of a prompt, by its number of tokens

    def warm_up(self, workload: Workload) -> None:
        """Find how many words have the prompt's number of tokens, and whether the server goes on after an end-of-text token.

        Raises InputError for a server that cannot be reached, and RefusedError if it refuses the request.
        """
        words = workload.input_tokens
        for _ in range(2):
            tokens = self._measured(words, workload).input_tokens
            words = max(1, round(words * workload.input_tokens / tokens))
        self._words[workload.input_tokens] = words
        self.run(workload, seed=0)

    def run(self, workload: Workload, seed: int) -> Sequence[Request]:
        words = self._words.get(workload.input_tokens)
        if words is None:
            raise InputError(f"workload {workload}: was not warmed up", "call warm_up first")
        prompts = [_prompt(words, f"{self._session} {workload} {seed} {number}") for number in range(workload.batch)]
        with ThreadPoolExecutor(workload.batch) as pool:
            start = time.perf_counter()
            answers = list(pool.map(lambda prompt: self._answer(prompt, workload.output_tokens), prompts))
        time.sleep(self.polling_seconds)
        return [
            Request(each.input_tokens, each.output_tokens, each.first - start, each.last - start) for each in answers
        ]

    def memory(self) -> None:
        """Servers do not say."""

    def _measured(self, words: int, workload: Workload) -> Streamed:
        try:
            return self._answer(_prompt(words, "warm-up"), 1)
        except RefusedError as error:
            if error.status not in _UNKNOWN_FIELD or not self._extra:
                raise
        self._extra = {}
        return self._answer(_prompt(words, "warm-up"), 1)

    def _answer(self, prompt: str, tokens: int) -> Streamed:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, **self._extra}
        return streamed(self.served, body)


def _prompt(words: int, seed: str) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choices(WORDS.split(), k=words))
