"""The benchmark scores of one model: in memory, by vLLM, or at a server."""

from __future__ import annotations

from dataclasses import dataclass
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
        failures: dict[str, str] = {}

        def on_failure(task: str, error: Exception) -> None:
            failures[task] = one_line(error)
            self.console.say(f"  [yellow]{escape(task)} failed: {escape(failures[task])}[/]")

        if is_served(name):
            return self._at_server(name, failures, on_failure)
        with checkpoint(name, self.locations) as source, self.console.working(Path(name).name or name):
            self.console.status("loading")
            if self.engine == "vllm":
                return self._by_vllm(name, source, failures, on_failure)
            return self._in_memory(name, source, failures, on_failure)

    def _in_memory(self, name: str, source: str, failures: dict[str, str], on_failure: Any) -> ModelResults:
        loaded = load(source, self.dtype)
        identity = loaded.identity()
        self.console.status("preparing benchmarks")
        scores = evaluate_documents(
            loaded.model,
            loaded.tokenizer,
            self.tasks,
            batch_size=self.batch_rows or "auto",
            progress=self.console.counter("documents"),
            on_failure=on_failure,
            samples=self.samples,
            answers=AnswerStore(self.locations.answers, identity),
        )
        return ModelResults(
            model=name,
            identity=identity,
            parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
            dtype=loaded.dtype,
            device=device_name(),
            tasks=scores,
            failures=failures,
            chat_template=_template_hash(loaded.tokenizer),
        )

    def _by_vllm(self, name: str, source: str, failures: dict[str, str], on_failure: Any) -> ModelResults:
        check_servable(source)
        dtype = str(compute_dtype(self.dtype)).removeprefix("torch.")
        identity = [source_identity(source), "vllm", dtype]
        with vllm_server(source, dtype=dtype) as engine:
            tokenizer = source_tokenizer(source)
            return self._served(name, engine.served, tokenizer, identity, dtype, device_name(), failures, on_failure)

    def _at_server(self, name: str, failures: dict[str, str], on_failure: Any) -> ModelResults:
        assert self.tokenizer is not None
        with self.console.working(name):
            served = Served.parse(name)
            tokenizer = source_tokenizer(self.tokenizer)
            identity = [served.url, served.model, model_entry(served)]
            return self._served(name, served, tokenizer, identity, "unknown", "server", failures, on_failure)

    def _served(
        self,
        name: str,
        served: Served,
        tokenizer: Any,
        named: Any,
        dtype: str,
        device: str,
        failures: dict[str, str],
        on_failure: Any,
    ) -> ModelResults:
        """named: a JSON value that names the model that is served."""
        identity = storage.fingerprint([named, tokenizer_identity(tokenizer)])
        self.console.status("preparing benchmarks")
        scores = evaluate_served(
            served,
            tokenizer,
            self.tasks,
            concurrent=self.batch_rows,
            progress=self.console.counter("documents"),
            on_failure=on_failure,
            samples=self.samples,
            answers=AnswerStore(self.locations.answers, identity),
        )
        return ModelResults(
            model=name,
            identity=identity,
            parameters=None,
            dtype=dtype,
            device=device,
            tasks=scores,
            failures=failures,
            chat_template=_template_hash(tokenizer),
        )


def _template_hash(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return storage.fingerprint(template) if template else None
