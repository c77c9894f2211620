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
from minitron.checkpoints.identity import model_identity
from minitron.completions import Served, is_served, model_entry
from minitron.data import tokenizer_identity
from minitron.device import compute_dtype, device_name
from minitron.distill.loading import load_source_together
from minitron.errors import one_line
from minitron.evaluation import Task, evaluate_documents, evaluate_served
from minitron.evaluation.answers import AnswerStore
from minitron.evaluation.result_file import ModelResults
from minitron.evaluation.scores import Evaluated
from minitron.evaluation.served import CONCURRENT
from minitron.models import is_local_source, source_identity, source_tokenizer
from minitron.processes import from_first, is_sharded
from minitron.throughput import vllm_server
from minitron.throughput.vllm import check_servable
from minitron_platform.cli.model_sources import checkpoint
from minitron_platform.console import Console
from minitron_platform.recipes.paths import absolute
from minitron_platform.uploads import with_upload
from minitron_platform.workers.worker import Progress, Worker
from minitron_platform.workers.workers import Workers

if TYPE_CHECKING:
    from minitron_platform.locations import Locations


@dataclass(frozen=True)
class Scoring:
    """What all models of a command have in common.

    workers: score models in memory. upload: whether local models are copied to the storage, for workers on other machines.
    dtype: a name, or auto. batch_rows: requests in a batch, or at a time; None for what suits. tokenizer: of models at a
    server. engine: of the other models, transformers or vllm.
    """

    console: Console
    workers: Workers
    tasks: tuple[Task, ...]
    locations: Locations
    upload: bool
    dtype: str
    batch_rows: int | None
    samples: int
    tokenizer: str | None
    engine: str

    def score(self, name: str) -> ModelResults:
        """The scores of a model, and the reasons of tasks that failed, which are shown when they fail."""
        questions = Questions(self.tasks, self.samples, self.locations.answers)
        if is_served(name):
            assert self.tokenizer is not None
            with self.console.working(name):
                return _results(name, _at_server(name, self.tokenizer, self.batch_rows), questions, self.console)
        with checkpoint(name, self.locations) as source, self.console.working(Path(name).name or name):
            self.console.status("loading")
            if self.engine == "vllm":
                with _by_vllm(source, self.dtype, self.batch_rows) as answering:
                    return _results(name, answering, questions, self.console)
            if self.upload:
                source = with_upload(source, "model", self.locations.storage, self._say)
            elif is_local_source(source):
                source = absolute(source)  # workers have working directories of their own
            return self.workers.compute(_score, _InMemory(name, source, self.dtype, self.batch_rows, questions))

    def _say(self, line: str) -> None:
        self.console.say(escape(line))


@dataclass(frozen=True)
class Questions:
    """What a model is asked. samples: answers to keep of each task. answers: folder of the answers that are stored."""

    tasks: tuple[Task, ...]
    samples: int
    answers: str


@dataclass(frozen=True)
class _InMemory:
    """A model for workers to score. source: as `minitron.models.load_source` takes it, where the workers are."""

    name: str
    source: str
    dtype: str
    batch_rows: int | None
    questions: Questions


def _score(task: _InMemory, worker: Worker) -> ModelResults:
    """The scores of a model, whose documents all processes share."""
    worker.progress.status("loading")
    dtype = compute_dtype(task.dtype)
    together = worker.count > 1
    model, tokenizer = load_source_together(task.source, dtype, together=together)
    identity = model_identity(model, tokenizer) if worker.is_first or is_sharded(model) else ""
    answering = _Answering(
        partial(evaluate_documents, model, batch_size=task.batch_rows or "auto", together=together),
        tokenizer,
        from_first(identity.encode(), together).decode(),
        str(dtype).removeprefix("torch."),
        device_name(),
        "transformers",
        sum(parameter.numel() for parameter in model.parameters()),
    )
    return _results(task.name, answering, task.questions, worker.progress)


def _results(name: str, answering: _Answering, questions: Questions, progress: Progress) -> ModelResults:
    failures: dict[str, str] = {}

    def on_failure(task: str, error: Exception) -> None:
        failures[task] = one_line(error)
        progress.say(f"  [yellow]{escape(task)} failed: {escape(failures[task])}[/]")

    progress.status("preparing benchmarks")
    scores = answering.evaluate(
        tokenizer=answering.tokenizer,
        tasks=questions.tasks,
        progress=progress.counter("documents"),
        on_failure=on_failure,
        samples=questions.samples,
        answers=AnswerStore(questions.answers, answering.identity),
    )
    template = getattr(answering.tokenizer, "chat_template", None)
    return ModelResults(
        model=name,
        identity=answering.identity,
        parameters=answering.parameters,
        dtype=answering.dtype,
        device=answering.device,
        engine=answering.engine,
        tasks=scores,
        failures=failures,
        chat_template=storage.fingerprint(template) if template else None,
    )


@dataclass(frozen=True)
class _Answering:
    """A model that is ready to answer, and what its results say about it.

    evaluate: `evaluate_documents` or `evaluate_served` with the model. identity: of model and tokenizer, by which answers are
    kept. engine: see `ModelResults`. parameters: None if unknown.
    """

    evaluate: Callable[..., dict[str, Evaluated]]
    tokenizer: Any
    identity: str
    dtype: str
    device: str
    engine: str
    parameters: int | None = None


@contextmanager
def _by_vllm(source: str, dtype: str, batch_rows: int | None) -> Iterator[_Answering]:
    check_servable(source)
    chosen = str(compute_dtype(dtype)).removeprefix("torch.")
    tokenizer = source_tokenizer(source)
    identity = storage.fingerprint([[source_identity(source), "vllm", chosen], tokenizer_identity(tokenizer)])
    with vllm_server(source, dtype=chosen, concurrent=batch_rows or CONCURRENT) as engine:
        evaluate = partial(evaluate_served, engine.served, concurrent=batch_rows)
        yield _Answering(evaluate, tokenizer, identity, chosen, device_name(), "vllm")


def _at_server(name: str, tokenizer_source: str, batch_rows: int | None) -> _Answering:
    served = Served.parse(name)
    tokenizer = source_tokenizer(tokenizer_source)
    named = [served.url, served.model, model_entry(served)]
    identity = storage.fingerprint([named, tokenizer_identity(tokenizer)])
    evaluate = partial(evaluate_served, served, concurrent=batch_rows)
    return _Answering(evaluate, tokenizer, identity, "unknown", "server", "server")
