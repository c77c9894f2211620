"""The benchmark scores of one model: in memory, by vLLM, or at a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from minitron import storage
from minitron.completions import Served, is_served, model_entry
from minitron.data import tokenizer_identity
from minitron.device import compute_dtype, device_name
from minitron.errors import one_line
from minitron.evaluation import Task, evaluate_documents, evaluate_served
from minitron.evaluation.answers import AnswerStore
from minitron.evaluation.result_file import ModelResults
from minitron.evaluation.scores import Evaluated
from minitron.evaluation.served import CONCURRENT
from minitron.models import source_identity, source_tokenizer
from minitron.throughput import vllm_server
from minitron.throughput.vllm import check_servable
from minitron_platform.cli.model_sources import checkpoint, load
from minitron_platform.console import Console

if TYPE_CHECKING:
    from minitron_platform.locations import Locations


@dataclass(frozen=True)
class Scoring:
    """What all models of a command have in common.

    batch_rows: requests in a batch, or at a time; None for what suits. tokenizer: of models at a server. engine: of the other
    models, transformers or vllm.
    """

    console: Console
    tasks: tuple[Task, ...]
    locations: Locations
    dtype: str
    batch_rows: int | None
    samples: int
    tokenizer: str | None
    engine: str

    def score(self, name: str) -> ModelResults:
        """The scores of a model, and the reasons of tasks that failed, which are shown when they fail."""
        if is_served(name):
            assert self.tokenizer is not None
            with self.console.working(name):
                return self._results(name, _at_server(name, self.tokenizer, self.batch_rows))
        with checkpoint(name, self.locations) as source, self.console.working(Path(name).name or name):
            self.console.status("loading")
            if self.engine == "vllm":
                with _by_vllm(source, self.dtype, self.batch_rows) as answering:
                    return self._results(name, answering)
            return self._results(name, _in_memory(source, self.dtype, self.batch_rows))

    def _results(self, name: str, answering: _Answering) -> ModelResults:
        failures: dict[str, str] = {}

        def on_failure(task: str, error: Exception) -> None:
            failures[task] = one_line(error)
            self.console.say(f"  [yellow]{escape(task)} failed: {escape(failures[task])}[/]")

        self.console.status("preparing benchmarks")
        scores = answering.evaluate(
            tokenizer=answering.tokenizer,
            tasks=self.tasks,
            progress=self.console.counter("documents"),
            on_failure=on_failure,
            samples=self.samples,
            answers=AnswerStore(self.locations.answers, answering.identity),
        )
        template = getattr(answering.tokenizer, "chat_template", None)
        return ModelResults(
            model=name,
            identity=answering.identity,
            parameters=answering.parameters,
            dtype=answering.dtype,
            device=answering.device,
            tasks=scores,
            failures=failures,
            chat_template=storage.fingerprint(template) if template else None,
        )


@dataclass(frozen=True)
class _Answering:
    """A model that is ready to answer, and what its results say about it.

    evaluate: `evaluate_documents` or `evaluate_served` with the model. identity: of model and tokenizer, by which answers are
    kept. parameters: None if unknown.
    """

    evaluate: Callable[..., dict[str, Evaluated]]
    tokenizer: Any
    identity: str
    dtype: str
    device: str
    parameters: int | None = None


def _in_memory(source: str, dtype: str, batch_rows: int | None) -> _Answering:
    loaded = load(source, dtype)
    return _Answering(
        partial(evaluate_documents, loaded.model, batch_size=batch_rows or "auto"),
        loaded.tokenizer,
        loaded.identity(),
        loaded.dtype,
        device_name(),
        sum(parameter.numel() for parameter in loaded.model.parameters()),
    )


@contextmanager
def _by_vllm(source: str, dtype: str, batch_rows: int | None) -> Iterator[_Answering]:
    check_servable(source)
    chosen = str(compute_dtype(dtype)).removeprefix("torch.")
    tokenizer = source_tokenizer(source)
    identity = storage.fingerprint([[source_identity(source), "vllm", chosen], tokenizer_identity(tokenizer)])
    with vllm_server(source, dtype=chosen, concurrent=batch_rows or CONCURRENT) as engine:
        evaluate = partial(evaluate_served, engine.served, concurrent=batch_rows)
        yield _Answering(evaluate, tokenizer, identity, chosen, device_name())


def _at_server(name: str, tokenizer_source: str, batch_rows: int | None) -> _Answering:
    served = Served.parse(name)
    tokenizer = source_tokenizer(tokenizer_source)
    named = [served.url, served.model, model_entry(served)]
    identity = storage.fingerprint([named, tokenizer_identity(tokenizer)])
    return _Answering(partial(evaluate_served, served, concurrent=batch_rows), tokenizer, identity, "unknown", "server")
