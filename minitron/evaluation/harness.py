"""Benchmark scores through lm-eval, on a model in memory.

The definitions, prompts and log-likelihoods are lm-eval's own, so scores compare with published ones. Its lower-level
`evaluate` is called, not `simple_evaluate`: that one reseeds the process's random generators and runs shell commands.
"""

from __future__ import annotations

import copy
import logging
import math
import random
import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

from minitron.arguments import check_model, check_tokenizer, check_type
from minitron.data import document_tokens
from minitron.errors import InputError, MinitronError
from minitron.evaluation.benchmarks import FILTER, METRIC
from minitron.evaluation.continuations import Continuation, log_likelihoods
from minitron.evaluation.metrics import Metric, task_metric
from minitron.evaluation.mode import evaluating
from minitron.evaluation.requests import DocumentRequests
from minitron.evaluation.tasks import Part, Task, build, check_settings, check_tasks, parts

log = logging.getLogger(__name__)

OnFailure = Callable[[str, Exception], None]  # a task's name and what it raised


@dataclass(frozen=True)
class Score:
    """One benchmark's result. `value` and `stderr` are as lm-eval gives them, shares of 1 for accuracies; `shown_as` knows
    the unit they are shown in."""

    task: str
    metric: str
    """As in lm-eval's tables, for example "acc" or "acc_norm"; see `benchmarks.METRIC` for the choice."""
    value: float
    stderr: float | None
    """Of the mean over documents; None with one document, or for a metric that is no mean over documents."""
    num_documents: int
    num_fewshot: int
    version: str
    """lm-eval's version of the task definition; scores of different versions do not compare."""
    split: str
    """The split whose documents were scored."""
    higher_is_better: bool | None
    """As lm-eval says of the metric; false for a perplexity, None where neither it nor we know."""

    @property
    def shown_as(self) -> Metric:
        """Unit and format of `value` and `stderr`."""
        return task_metric(self.task, self.metric)


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    batch_size: int = 8,
    add_bos: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_failure: OnFailure | None = None,
    together: bool = False,
) -> dict[str, Score]:
    """Score a transformers causal LM on each task, on its device and in its dtype; {task name: Score}.

    Log-softmax is computed in float32. A task uses its first `limit` documents, the same for every model. The model's training
    mode, the tokenizer and the global random states are not changed. `progress(done, total)` counts documents. add_bos: as
    for `minitron.data.pack`; every request starts as the rows packed with it do. Requests longer than the model's context
    are truncated on the left, with a warning.

    on_failure: called with the name and the error of a task that raises, which is then left out; out-of-memory errors are
    always raised. together: all processes of torch.distributed make the same call, and a task that one of them cannot
    prepare is left out by all. Raises InputError as `check_tasks` does, for documents without the fields that a task
    reads, if `add_bos` is true and the tokenizer has no BOS token, and for arguments of the wrong type.
    """
    check_model("model", model)
    check_tokenizer("tokenizer", tokenizer)
    for task in tasks:
        check_type("tasks", task, Task, "a Task")
    if on_failure is None:
        check_tasks(tasks)
    check_settings(tasks)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}", "give 1 or more")
    with _quiet(), _same_random_state(), evaluating(model):
        work = _prepared(tasks, on_failure, together)
        sizes = [min(len(built.task_docs), task.limit or math.inf) for task, members in work for _, built in members]
        scorer = _Scorer(model, tokenizer, batch_size, add_bos, int(sum(sizes)), progress)
        scores = {}
        for task, members in work:
            with _reported(task, on_failure):
                own = [_score(scorer, task, part.name, part.scored, built) for part, built in members]
                scores[task.name] = own[0] if len(own) == 1 else _pooled(task.name, own)
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
    """Every task that can run, with its parts and their documents."""
    errors: dict[str, Exception] = {}
    built: dict[str, list[tuple[Part, Any]]] = {}
    for task in tasks:
        with _reported(task, None if on_failure is None else errors.__setitem__):
            built[task.name] = [(part, build(task, part)) for part in parts(task)]
    if together and dist.is_initialized():
        # the processes of a sharded model run every forward pass together
        kind = "cpu" if dist.get_backend() == "gloo" else "cuda"
        lost = torch.tensor([task.name in errors for task in tasks], dtype=torch.int64, device=kind)
        dist.all_reduce(lost)
        for task, count in zip(tasks, lost.tolist(), strict=True):
            if count and task.name not in errors:
                errors[task.name] = MinitronError(f"task {task.name!r}: {count} other processes could not prepare it")
    if on_failure is not None:
        for name, error in errors.items():
            on_failure(name, error)
    return [(task, built[task.name]) for task in tasks if task.name not in errors]


@contextmanager
def _reported(task: Task, on_failure: OnFailure | None) -> Iterator[None]:
    """Tells of what a task raises instead of raising it, where somebody listens."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise  # the model's own trouble
    except Exception as error:
        if on_failure is None:
            raise
        on_failure(task.name, error)


def _score(scorer: _Scorer, task: Task, name: str, split: str, built: Any) -> Score:
    scorer.begin(min(len(built.task_docs), task.limit or len(built.task_docs)))
    # Standard errors are computed below from the documents' values; lm-eval would bootstrap for some metrics.
    results = run_harness(scorer, {"tasks": {name: built}}, limit=task.limit, bootstrap_iters=0, log_samples=True)
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
    """A group's score: the mean over all its documents, as lm-eval's weight_by_size."""
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
    """lm-eval's transformers backend, reporting documents as their requests are answered."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int,
        add_bos: bool | None,
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.around = document_tokens(tokenizer, add_bos)
        before = [*self.around.end, *self.around.begin]  # a text that no context precedes
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # lm-eval sets a padding token on the one it is given
            batch_size=batch_size,
            softmax_dtype="float32",
            prefix_token_id=before[-1] if before else None,
        )
        self._progress, self._total, self._before, self._documents = progress, total, 0, 0
        self.set_cache_hook(_Answered(self))

    def begin(self, documents: int) -> None:
        self._before += self._documents
        self._documents = documents

    def _expect(self, requests: list[Any]) -> None:
        self._expected, self._done = len(requests), 0

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
        for start in range(0, len(requests), self.batch_size):  # the parent answers all that it is given at its end
            answers += super().loglikelihood_rolling(requests[start : start + self.batch_size], disable_tqdm=True)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self._expect(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """As the parent's, but each context is computed once for all that is asked behind it, and logits only where a
        continuation is: [batch, length, vocabulary] in float32 does not fit beside a large model. Raises InputError for a
        continuation that has no tokens, or more than the model takes."""
        asked = []
        for _text, context, tokens in requests:
            if not 0 < len(tokens) <= self.max_length:
                raise InputError(
                    f"an answer of {len(tokens):,} tokens, and the model takes 1 to {self.max_length:,}",
                    "take its document out, or leave the task out",
                )
            kept = self.cut_left(context + tokens, self.max_length + 1, needed=len(tokens))
            asked.append(Continuation(kept[: -len(tokens)], tokens))
        found: dict[int, tuple[float, bool]] = {}
        for number, answer in log_likelihoods(self.model, asked, self.batch_size):
            found[number] = answer.log_likelihood, answer.greedy
            if requests[number][0] is not None:  # else a window of a document, whose answer is the parent's
                self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return [found[number] for number in range(len(requests))]


class _Answered(CacheHook):
    """lm-eval tells its cache hook of every answered request; this one counts them and caches nothing."""

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
    """No bars and notes from lm-eval and datasets meanwhile; `progress` speaks instead. Errors still show."""
    modules = (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface)
    bars = [module.tqdm for module in modules]
    logger = logging.getLogger("lm_eval")
    level, had_bars = logger.level, not datasets.are_progress_bars_disabled()
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
    """Some task definitions draw from or seed the global generators; a training run around us must not notice."""
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
