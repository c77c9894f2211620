"""Benchmark scores of a model in memory, by lm-eval.

Task definitions, prompts and metrics are lm-eval's, so that scores can be compared with published ones. Its lower-level
`evaluate` is called because `simple_evaluate` reseeds the process's random generators and runs shell commands.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.evaluator import evaluate as run_harness

from minitron.arguments import check_model, check_tokenizer, check_type
from minitron.errors import InputError, MinitronError
from minitron.evaluation.answers import Answers, AnswerStore
from minitron.evaluation.batches import BatchRows
from minitron.evaluation.build import build, documents_of, metrics_guard
from minitron.evaluation.generated_code import with_problems
from minitron.evaluation.mode import evaluating
from minitron.evaluation.pooling import pooled
from minitron.evaluation.questions import check_questions
from minitron.evaluation.quiet import quiet, usual_random_state
from minitron.evaluation.scorer import Scorer
from minitron.evaluation.scores import Evaluated, Score
from minitron.evaluation.scoring import evaluated
from minitron.evaluation.tasks import (
    Part,
    Task,
    by_size,
    check_settings,
    check_tasks,
    is_group,
    parts,
    scored_documents,
)
from minitron.evaluation.templates import sandboxed_templates
from minitron.processes import from_first, largest, own_rank, world_size

if TYPE_CHECKING:
    from minitron.completions import Served

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
    results = evaluate_documents(
        model,
        tokenizer,
        tasks,
        batch_size=batch_size,
        add_bos=add_bos,
        progress=progress,
        on_failure=on_failure,
        together=together,
    )
    return {name: result.score for name, result in results.items()}


def evaluate_documents(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    batch_size: BatchRows = 8,
    add_bos: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_failure: OnFailure | None = None,
    together: bool = False,
    samples: int = 0,
    answers: AnswerStore | None = None,
) -> dict[str, Evaluated]:
    """As `evaluate`, with all metrics of each task and the result of each document: {task name: Evaluated}.

    samples: number of documents of each task, the worst first, that are kept with the prompt and the model's answer. answers:
    where the model's answers are kept; an evaluation that was interrupted is resumed from them, and a repeated one computes
    nothing. Scores are those of an evaluation without them, bit for bit on the same hardware.
    """
    check_model("model", model)
    check_tokenizer("tokenizer", tokenizer)
    _check_tasks(tasks, tokenizer, on_failure)
    if batch_size != "auto":
        check_type("batch_size", batch_size, Integral, "a number, or auto")
        if batch_size < 1:
            raise InputError(f"batch_size: {batch_size} is less than 1", "give 1 or more, or auto")

    def scorer(total: int) -> Scorer:
        return Scorer(model, tokenizer, batch_size, add_bos, total, progress, together)

    with evaluating(model):
        return _all_scored(tasks, scorer, on_failure, together, samples, answers)


def evaluate_served(
    served: Served,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    concurrent: int | None = None,
    add_bos: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_failure: OnFailure | None = None,
    samples: int = 0,
    answers: AnswerStore | None = None,
) -> dict[str, Evaluated]:
    """As `evaluate_documents`, of a model at a server, whose tokenizer is `tokenizer`. concurrent: requests at a time.

    Kept answers are those of what `answers.model` names: a server may change its model behind the same name, unseen. Raises
    what the server's answers raise (see `minitron.completions`).
    """
    from minitron.evaluation.served import CONCURRENT, ServedScorer

    check_tokenizer("tokenizer", tokenizer)
    _check_tasks(tasks, tokenizer, on_failure)
    chosen = concurrent or CONCURRENT

    def scorer(total: int) -> Scorer:
        return ServedScorer(served, tokenizer, chosen, add_bos, total, progress)

    return _all_scored(tasks, scorer, on_failure, False, samples, answers)


def _check_tasks(tasks: Sequence[Task], tokenizer: Any, on_failure: OnFailure | None) -> None:
    for task in tasks:
        check_type("tasks", task, Task, "a Task")
    if on_failure is None:
        check_tasks(tasks)
    check_settings(tasks)
    if any(task.chat_template for task in tasks) and not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "chat_template: the model's tokenizer has no chat template", "give an instruct model, or leave it out"
        )


def _all_scored(
    tasks: Sequence[Task],
    make_scorer: Callable[[int], Scorer],
    on_failure: OnFailure | None,
    together: bool,
    samples: int,
    answers: AnswerStore | None,
) -> dict[str, Evaluated]:
    """The results of all tasks. make_scorer: takes their number of documents."""
    with quiet(), sandboxed_templates(), usual_random_state():
        work = _prepared(tasks, on_failure, together)
        sizes = [scored_documents(task.limit, len(built.task_docs)) for task, members in work for _, built in members]
        scorer = make_scorer(sum(sizes))
        results = {}
        for task, members in work:
            with _reported(task, on_failure):
                own = {part.name: _shared(scorer, task, part, built, samples, answers) for part, built in members}
                whole = is_group(task)
                results[task.key] = pooled(task.name, own, samples, by_size=by_size(task)) if whole else own[task.name]
            if scorer.cut:
                log.warning(
                    "%s: %d requests exceed the model's %d tokens; they were cut from the left",
                    task.name,
                    scorer.cut,
                    scorer.max_length,
                )
                scorer.cut = 0
    return results


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


def _shared(scorer: Scorer, task: Task, part: Part, built: Any, samples: int, answers: AnswerStore | None) -> Evaluated:
    """The result of a task, in every process. All answer its requests; the first one grades the answers."""
    stored = None
    if answers is not None:
        settings = task.settings() | {"data": None, "limit": None}
        settings.pop("examples", None)  # the requests contain them
        name = [settings, part.name, str(built.VERSION), scorer.settings()]
        if built.OUTPUT_TYPE == "generate_until" and (of_text := scorer.text_settings()):
            name.append(of_text)
        stored = answers.open(name, scorer.together)
    try:
        return _graded(scorer, task, part, built, samples, stored)
    finally:
        if stored is not None:
            stored.flush()


def _graded(scorer: Scorer, task: Task, part: Part, built: Any, samples: int, stored: Answers | None) -> Evaluated:
    if world_size(scorer.together) == 1:
        return _evaluated(scorer, task, part, built, samples, stored)
    if own_rank() > 0:

        def stop() -> None:
            raise _AllAnsweredError

        built.apply_filters = stop  # which lm-eval calls when it has all answers
    result = b""
    try:
        with suppress(_AllAnsweredError):
            result = json.dumps(asdict(_evaluated(scorer, task, part, built, samples, stored))).encode()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        from_first(b"", together=True)
        raise
    result = from_first(result, together=True)
    if not result:
        raise MinitronError(f"task {task.name!r} failed in the first process", "its log says why")
    return Evaluated.from_dict(json.loads(result))


@contextmanager
def _documents_named(task: Task, part: Part, built: Any, count: int) -> Iterator[None]:
    """Name the document, if an exception is one of lm-eval that cannot make a question of it."""
    try:
        yield
    except (MinitronError, MemoryError, torch.OutOfMemoryError, _AllAnsweredError):
        raise
    except Exception:
        if part.splits is not None:
            examples = documents_of(task, part, part.examples) if part.examples else None
            check_questions(built, documents_of(task, part, part.scored), examples, count)
        raise


def _evaluated(scorer: Scorer, task: Task, part: Part, built: Any, samples: int, stored: Answers | None) -> Evaluated:
    limit = scored_documents(task.limit, len(built.task_docs))
    scorer.begin(limit, stored)
    # Standard errors are computed below from the documents' values; lm-eval would bootstrap for some metrics.
    with metrics_guard(task, part), _documents_named(task, part, built, limit):
        results = run_harness(
            scorer,
            {"tasks": {part.name: built}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=task.chat_template,
            fewshot_as_multiturn=task.chat_template,
            confirm_run_unsafe_code=task.allow_code,  # in a sandbox, see `build`
        )
    result = evaluated(
        task.name,
        part.name,
        built,
        results,
        split=part.scored,
        num_fewshot=task.num_fewshot,
        samples=samples,
        examples=part.examples,
    )
    return result if built.minitron_sandbox is None else with_problems(result, built.minitron_sandbox)
