"""Benchmark scores of a model in memory, by lm-eval.

Task definitions, prompts and metrics are lm-eval's, so that scores can be compared with published ones. Its lower-level
`evaluate` is called because `simple_evaluate` reseeds the process's random generators and runs shell commands.
"""

from __future__ import annotations

import json
import logging
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from numbers import Integral
from typing import Any

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import numpy as np
import torch
from lm_eval.api.metrics import mean
from lm_eval.evaluator import evaluate as run_harness
from tqdm import tqdm  # type: ignore[import-untyped]

from minitron.arguments import check_model, check_tokenizer, check_type
from minitron.errors import InputError, MinitronError
from minitron.evaluation.batches import BatchRows
from minitron.evaluation.benchmarks import FILTER, METRIC
from minitron.evaluation.generated_code import guarded_metrics
from minitron.evaluation.metrics import task_metric
from minitron.evaluation.mode import evaluating
from minitron.evaluation.scorer import Scorer
from minitron.evaluation.scores import Score
from minitron.evaluation.tasks import Part, Task, build, check_settings, check_tasks, parts
from minitron.processes import from_first, largest, own_rank, world_size

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
    errors are always raised. together: all processes of torch.distributed make the same call and share the batches, which are
    those of one process; all return its scores. They leave out a task that one of them cannot prepare, and the first one alone
    grades the answers. Raises InputError as `check_tasks`, for documents without the fields that a task reads, if `add_bos`
    is true and the tokenizer has no BOS token, and for arguments of the wrong type.
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
    with _quiet(), _usual_random_state(), evaluating(model):
        work = _prepared(tasks, on_failure, together)
        sizes = [min(len(built.task_docs), task.limit or math.inf) for task, members in work for _, built in members]
        scorer = Scorer(model, tokenizer, batch_size, add_bos, int(sum(sizes)), progress, together)
        scores = {}
        for task, members in work:
            with _reported(task, on_failure):
                own = [_shared_score(scorer, task, part, built) for part, built in members]
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
    failed = largest([task.key in errors for task in tasks], together)
    for task, elsewhere in zip(tasks, failed, strict=True):
        if elsewhere and task.key not in errors:
            errors[task.key] = MinitronError(f"task {task.name!r}: another process could not prepare it")
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


class _AllAnsweredError(Exception):
    """Ends lm-eval's evaluation in a process that does not grade."""


def _shared_score(scorer: Scorer, task: Task, part: Part, built: Any) -> Score:
    """The score of a task, in every process. All answer its requests; the first one grades the answers."""
    if world_size(scorer.together) == 1:
        return _score(scorer, task, part.name, part.scored, built)
    if own_rank() > 0:

        def stop() -> None:
            raise _AllAnsweredError

        built.apply_filters = stop  # which lm-eval calls when it has all answers
    result = b""
    try:
        with suppress(_AllAnsweredError):
            result = json.dumps(asdict(_score(scorer, task, part.name, part.scored, built))).encode()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        from_first(b"", together=True)
        raise
    result = from_first(result, together=True)
    if not result:
        raise MinitronError(f"task {task.name!r} failed in the first process", "its log says why")
    return Score(**json.loads(result))


def _score(scorer: Scorer, task: Task, name: str, split: str, built: Any) -> Score:
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
def _usual_random_state() -> Iterator[None]:
    """Seed the global random generators, which some task definitions use, as lm-eval does, and restore their states on exit."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
