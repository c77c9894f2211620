"""Benchmark scores of a model in memory, by lm-eval.

Task definitions, prompts and metrics are lm-eval's, so that scores can be compared with published ones. Its lower-level
`evaluate` is called because `simple_evaluate` reseeds the process's random generators and runs shell commands.
"""

from __future__ import annotations

import copy
import logging
import math
import random
import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Integral
from typing import Any

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import numpy as np
import torch
import torch.distributed as dist
from lm_eval.api.metrics import mean
from lm_eval.api.model import CacheHook
from lm_eval.evaluator import evaluate as run_harness
from tqdm import tqdm  # type: ignore[import-untyped]

from minitron.architecture import Architecture
from minitron.arguments import check_model, check_tokenizer, check_type
from minitron.data import document_tokens
from minitron.errors import InputError, MinitronError
from minitron.evaluation.batches import CPU_ROWS, BatchRows, generated_rows
from minitron.evaluation.benchmarks import FILTER, METRIC
from minitron.evaluation.continuations import Continuation, log_likelihoods
from minitron.evaluation.generated_code import guarded_metrics
from minitron.evaluation.metrics import task_metric
from minitron.evaluation.mode import evaluating
from minitron.evaluation.requests import DocumentRequests
from minitron.evaluation.scores import Score
from minitron.evaluation.tasks import Part, Task, build, check_settings, check_tasks, parts

log = logging.getLogger(__name__)

OnFailure = Callable[[str, Exception], None]  # (a task's name, the exception that it raised)


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    batch_size: BatchRows = 8,
    add_bos: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_failure: OnFailure | None = None,
    together: bool = False,
) -> dict[str, Score]:
    """Score a transformers causal LM on each task, on its device and in its dtype: {task name: Score}.

    Log-softmax is computed in float32. A task uses its first `limit` documents, the same for every model. The model's training
    mode, the tokenizer and the global random states are not changed. `progress(done, total)` counts documents. batch_size:
    requests in a batch, or "auto" (see `minitron.evaluation.batches`); it changes results by rounding at most. add_bos: as in
    `minitron.data.pack`; every request starts with the same special tokens as a packed row. Requests longer than the model's
    context are truncated on the left, with a warning.

    on_failure: called with the name and the exception of a task that fails; the result then lacks this task. Out-of-memory
    errors are always raised. together: all processes of torch.distributed make the same call, and all leave out a task that
    one of them cannot prepare. Raises InputError as `check_tasks`, for documents without the fields that a task reads, if
    `add_bos` is true and the tokenizer has no BOS token, and for arguments of the wrong type.
    """
    check_model("model", model)
    check_tokenizer("tokenizer", tokenizer)
    for task in tasks:
        check_type("tasks", task, Task, "a Task")
    if on_failure is None:
        check_tasks(tasks)
    check_settings(tasks)
    if batch_size != "auto":
        check_type("batch_size", batch_size, Integral, "a number, or auto")
        if batch_size < 1:
            raise InputError(f"batch_size: {batch_size} is less than 1", "give 1 or more, or auto")
    with _quiet(), _same_random_state(), evaluating(model):
        work = _prepared(tasks, on_failure, together)
        sizes = [min(len(built.task_docs), task.limit or math.inf) for task, members in work for _, built in members]
        scorer = _Scorer(model, tokenizer, batch_size, add_bos, int(sum(sizes)), progress)
        scores = {}
        for task, members in work:
            with _reported(task, on_failure):
                own = [_score(scorer, task, part.name, part.scored, built) for part, built in members]
                scores[task.key] = own[0] if len(own) == 1 else _pooled(task.name, own)
            if scorer.cut:
                log.warning(
                    "%s: %d requests exceed the model's %d tokens; they were cut from the left",
                    task.name,
                    scorer.cut,
                    scorer.max_length,
                )
                scorer.cut = 0
    return scores


def _prepared(
    tasks: Sequence[Task], on_failure: OnFailure | None, together: bool
) -> list[tuple[Task, list[tuple[Part, Any]]]]:
    """Every task that can run, with its definitions and their documents loaded."""
    errors: dict[str, Exception] = {}
    built: dict[str, list[tuple[Part, Any]]] = {}
    for task in tasks:
        with _reported(task, None if on_failure is None else errors.__setitem__):
            built[task.key] = [(part, build(task, part)) for part in parts(task)]
    if together and dist.is_initialized():
        # the processes of a sharded model run every forward pass together
        kind = "cpu" if dist.get_backend() == "gloo" else "cuda"
        failures = torch.tensor([task.key in errors for task in tasks], dtype=torch.int64, device=kind)
        dist.all_reduce(failures)
        for task, count in zip(tasks, failures.tolist(), strict=True):
            if count and task.key not in errors:
                errors[task.key] = MinitronError(f"task {task.name!r}: {count} other processes could not prepare it")
    if on_failure is not None:
        for name, error in errors.items():
            on_failure(name, error)
    return [(task, built[task.key]) for task in tasks if task.key not in errors]


@contextmanager
def _reported(task: Task, on_failure: OnFailure | None) -> Iterator[None]:
    """Pass an exception of `task` to `on_failure` if it is given; otherwise raise it."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise  # it concerns the model, not the task
    except Exception as error:
        if on_failure is None:
            raise
        on_failure(task.key, error)


def _score(scorer: _Scorer, task: Task, name: str, split: str, built: Any) -> Score:
    scorer.begin(min(len(built.task_docs), task.limit or len(built.task_docs)))
    # Standard errors are computed below from the documents' values; lm-eval would bootstrap for some metrics.
    with guarded_metrics() if task.allow_code else nullcontext():
        results = run_harness(
            scorer,
            {"tasks": {name: built}},
            limit=task.limit,
            bootstrap_iters=0,
            log_samples=True,
            confirm_run_unsafe_code=task.allow_code,  # in a sandbox, see `build`
        )
    metrics = [key for key in built.aggregation() if any(k.startswith(f"{key},") for k in results["results"][name])]
    metric = METRIC[task.name] if METRIC.get(task.name) in metrics else metrics[0]
    filters = [key.split(",", 1)[1] for key in results["results"][name] if key.startswith(f"{metric},")]
    chosen = FILTER[task.name] if FILTER.get(task.name) in filters else filters[0]
    values = [sample[metric] for sample in results["samples"][name] if sample["filter"] == chosen]
    is_mean = built.aggregation()[metric] is mean
    higher_is_better = built.higher_is_better()[metric]
    if higher_is_better is None:
        higher_is_better = task_metric(name, metric).higher_is_better
    return Score(
        task=name,
        metric=metric,
        value=float(results["results"][name][f"{metric},{chosen}"]),
        stderr=statistics.stdev(map(float, values)) / math.sqrt(len(values)) if is_mean and len(values) > 1 else None,
        num_documents=len(values),
        num_fewshot=task.num_fewshot,
        version=str(results["versions"][name]),
        split=split,
        higher_is_better=higher_is_better,
    )


def _pooled(name: str, members: list[Score]) -> Score:
    """The score of a group of tasks: the mean over all their documents (lm-eval's weight_by_size)."""
    total = sum(score.num_documents for score in members)
    known = [score.stderr for score in members if score.stderr is not None]
    variance = sum((s.num_documents / total * (s.stderr or 0.0)) ** 2 for s in members)
    return Score(
        task=name,
        metric=members[0].metric,
        value=sum(score.value * score.num_documents for score in members) / total,
        stderr=math.sqrt(variance) if len(known) == len(members) else None,
        num_documents=total,
        num_fewshot=members[0].num_fewshot,
        version=members[0].version,
        split=members[0].split,
        higher_is_better=members[0].higher_is_better,
    )


class _Scorer(DocumentRequests):
    """lm-eval's transformers backend, which reports progress in documents."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: BatchRows,
        add_bos: bool | None,
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.around = document_tokens(tokenizer, add_bos)
        self._batch_rows = batch_size
        before = [*self.around.end, *self.around.begin]  # tokens before a text without context
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # lm-eval sets a padding token on the one it is given
            batch_size=CPU_ROWS if batch_size == "auto" else batch_size,
            softmax_dtype="float32",
            prefix_token_id=before[-1] if before else None,
        )
        # of texts that are generated, and of rolling requests
        self.batch_size_per_gpu = generated_rows(
            batch_size, Architecture.from_config(model.config), self.max_length, self.device
        )
        self._progress = progress
        self._total = total  # documents of all tasks
        self._before = 0  # documents of the tasks before the current one
        self._documents = 0  # documents of the current task
        self.set_cache_hook(_Answered(self))

    def begin(self, documents: int) -> None:
        """Start counting the next task, which has this number of documents."""
        self._before += self._documents
        self._documents = documents

    def _expect(self, requests: list[Any]) -> None:
        self._expected = len(requests)
        self._done = 0

    def count_answer(self) -> None:
        before = self._documents * self._done // self._expected
        self._done += 1
        now = self._documents * self._done // self._expected
        if self._progress is not None and now > before:
            self._progress(self._before + now, self._total)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._expect(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        self._expect(requests)
        answers: list[float] = []
        for start in range(
            0, len(requests), self.batch_size
        ):  # in batches: the parent reports nothing until it has all
            answers += super().loglikelihood_rolling(requests[start : start + self.batch_size], disable_tqdm=True)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self._expect(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """As the parent's, but every context is computed once for all of its continuations, and logits only for the tokens of
        continuations, because float32 [batch, length, vocabulary] does not fit into memory with a large model. Raises
        InputError for a continuation without tokens, or with more than the model's context."""
        continuations = []
        for _text, context, tokens in requests:
            if not 0 < len(tokens) <= self.max_length:
                raise InputError(
                    f"an answer has {len(tokens):,} tokens, but the model accepts 1 to {self.max_length:,}",
                    "remove its document, or leave the task out",
                )
            kept = self.cut_left(context + tokens, self.max_length + 1, needed=len(tokens))
            continuations.append(Continuation(kept[: -len(tokens)], tokens))
        answers: dict[int, tuple[float, bool]] = {}
        for number, answer in log_likelihoods(self.model, continuations, self._batch_rows):
            answers[number] = answer.log_likelihood, answer.greedy
            if requests[number][0] is not None:  # None for a window of a rolling request, which is counted as a whole
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        return [answers[number] for number in range(len(requests))]


class _Answered(CacheHook):
    """lm-eval calls its cache hook for every answered request; this one counts them and caches nothing."""

    def __init__(self, scorer: _Scorer) -> None:
        super().__init__(None)
        self._scorer = weakref.ref(scorer)  # which has this hook: in a cycle the model would stay on the GPU

    def add_partial(self, *_: Any) -> None:
        if scorer := self._scorer():
            scorer.count_answer()


class _NoBar(tqdm):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "disable": True})


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and messages below error level of lm-eval and datasets inside the context."""
    modules = (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface)
    bars = [module.tqdm for module in modules]
    logger = logging.getLogger("lm_eval")
    level = logger.level
    had_bars = not datasets.are_progress_bars_disabled()
    for module in modules:
        module.tqdm = _NoBar
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar
        logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


@contextmanager
def _same_random_state() -> Iterator[None]:
    """Restore the global random states on exit: some task definitions use or seed them, which must not affect a training."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
