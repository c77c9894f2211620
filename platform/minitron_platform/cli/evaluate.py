"""`minitron evaluate`: benchmark scores of models, on this machine, a cluster, or at a server."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from minitron.errors import InputError
from minitron_platform.cli.model_sources import (
    MODEL_HELP,
    SERVER_HELP,
    check_models,
    dtype_option,
    engine_option,
    is_registered,
)
from minitron_platform.cli.options import check_out, tracking_options
from minitron_platform.cli.program import command_line
from minitron_platform.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable

    from minitron.evaluation import Suite, Task
    from minitron.evaluation.result_file import ModelResults
    from minitron_platform.locations import Locations

DEFAULT_SUITE = "quick"
UPLOAD_MODELS_HELP = "Copy local models and documents to the storage first, for nodes that do not have them."
SHOWN_CHARACTERS = 1_000  # of a prompt or an answer in the terminal


@click.command(epilog=f"{MODEL_HELP} {SERVER_HELP}")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--suite",
    metavar="NAME",
    help="Tasks of a suite: minitron-base, minitron-instruct, quick, or your own in a .yaml file. [default: quick]",
)
@click.option("--tasks", metavar="A,B:5", help="lm-eval tasks or groups instead; :5 gives 5 examples.")
@click.option(
    "--data", metavar="DIR", help="Folder with one folder of documents per task. [default: the hub's datasets]"
)
@click.option(
    "--limit", type=float, metavar="N", help="Score the first N documents of each task, or below 1 that share."
)
@click.option("--task-folder", metavar="DIR", help="Folder with task definitions of your own.")
@click.option("--allow-code", is_flag=True, help="Allow tasks that run the model's programs, or Python code of a task.")
@click.option(
    "--samples", type=click.IntRange(0), default=0, metavar="N", help="Show N answers per task, wrong ones first."
)
@click.option("--out", metavar="FILE.json", help="Write all metrics, documents and samples to this file.")
@click.option("--batch-rows", type=click.IntRange(1), metavar="N", help="Requests in a batch. [default: chosen]")
@click.option("--tokenizer", metavar="DIR", help="Tokenizer of models at a server: a checkpoint folder or hub name.")
@click.option("--plan", "plan_only", is_flag=True, help="Only check that the tasks can run.")
@click.option("--address", metavar="ADDRESS", help="Address of a running Ray cluster. [default: this machine]")
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="Processes that share the documents. [default: one per GPU, one without GPUs]",
)
@click.option("--upload", is_flag=True, help=UPLOAD_MODELS_HELP)
@click.option(
    "--experiment", metavar="NAME", help="Record the scores in this experiment of MLflow, a run for each model."
)
@engine_option
@dtype_option
@tracking_options
def evaluate(
    locations: Locations,
    models: tuple[str, ...],
    suite: str | None,
    tasks: str | None,
    data: str | None,
    limit: float | None,
    task_folder: str | None,
    allow_code: bool,
    samples: int,
    out: str | None,
    batch_rows: int | None,
    tokenizer: str | None,
    plan_only: bool,
    address: str | None,
    workers: int | None,
    upload: bool,
    experiment: str | None,
    engine: str,
    dtype: str,
) -> None:
    """Score models on benchmarks, on this machine, on a cluster, or at a server.

    Answers are kept in the storage: an evaluation that was stopped is resumed, and a repeated one computes nothing again.
    Several workers give the scores of one.

    \b
    minitron evaluate ./student --suite minitron-base --data benchmarks --allow-code --out student.json
    minitron evaluate ./teacher ./student --tasks hellaswag:10,arc_challenge:25 --limit 500
    minitron evaluate smollm2-90m@champion --samples 5
    minitron evaluate s3://bucket/student --address auto --workers 8 --storage s3://bucket/runs
    """
    from minitron import storage
    from minitron.completions import is_served
    from minitron.evaluation.result_file import results_json
    from minitron.evaluation.suites import suite as named_suite
    from minitron.throughput.vllm import vllm_command
    from minitron_platform.cluster.own_workers import check_workers, own_workers
    from minitron_platform.tracking.check import check_accepts

    if suite is not None and tasks is not None:
        raise InputError("--suite and --tasks: both were given", "give one of them")
    chosen = named_suite(DEFAULT_SUITE if suite is None else suite) if tasks is None else None
    wanted = requested_tasks(chosen, tasks, data, limit, folder=task_folder, allow_code=allow_code)
    if engine != "transformers" and (workers or address):
        raise InputError(f"--engine {engine}: it has no workers", "leave out --workers and --address")
    if experiment is not None and not experiment.strip():
        raise InputError("--experiment: it is empty", "give a name, such as evaluations")
    console = Console(command_line())
    check_out(out)
    storage.check_folder_writable(locations.storage)
    if not all(map(is_served, models)):
        if engine == "transformers":
            check_workers(address, workers)
        else:
            vllm_command()
    _check(models, wanted, tokenizer, locations)
    if experiment is not None:
        check_accepts(locations.tracking_uri, experiment)
    console.say(f"{len(wanted)} task{'s' if len(wanted) > 1 else ''}: {escape(', '.join(task.key for task in wanted))}")
    if plan_only:
        return
    from minitron_platform.cli.evaluation_tables import sample_lines, score_table
    from minitron_platform.cli.scoring import Scoring

    if upload:
        wanted = _uploaded(wanted, locations.storage, lambda line: console.say(escape(line)))
    named = None if chosen is None else {"name": chosen.name, "version": chosen.version}
    with ExitStack() as recorded:  # ends after the results are shown and written, whether MLflow answers or not
        score = _recorded(recorded, locations, experiment, wanted, named, console)
        with own_workers(console, locations.storage, address=address, count=workers) as group:
            scoring = Scoring(console, group, wanted, locations, upload, dtype, batch_rows, samples, tokenizer, engine)
            results = [score(model, scoring.score) for model in models]
        console.table(score_table(results))
        for line in sample_lines(results, SHOWN_CHARACTERS) if samples else ():
            console.say(line)
        if out:
            storage.write_json(out, results_json(results, wanted, named))
            console.say(f"written to [bold]{escape(out)}[/]; compare files with `minitron compare`")
    if any(result.failures for result in results):
        raise SystemExit(1)


def _recorded(
    stack: ExitStack,
    locations: Locations,
    experiment: str | None,
    tasks: tuple[Task, ...],
    suite: dict[str, Any] | None,
    console: Console,
) -> Callable[[str, Callable[[str], ModelResults]], ModelResults]:
    """What scores a model, and records it in MLflow if there is an experiment; the record ends with `stack`."""
    if experiment is None:
        return lambda model, scored: scored(model)
    from minitron_platform.evaluation_record import evaluation_record

    return stack.enter_context(evaluation_record(locations, experiment, tasks, suite, console)).score


def requested_tasks(
    suite: Suite | None,
    tasks: str | None,
    data: str | None,
    limit: float | None,
    *,
    folder: str | None,
    allow_code: bool,
) -> tuple[Task, ...]:
    """The tasks of a suite, or those that `tasks` lists as NAME or NAME:SHOTS. Raises InputError for another list, and for a
    task that it has twice with one number of examples."""
    from minitron.evaluation import Task
    from minitron.evaluation.suites import folder_of, settings_of
    from minitron_platform.recipes.paths import absolute

    entries = settings_of(suite) if suite else _entries(tasks or "")
    made: list[Task] = []
    for entry in entries:
        repeated = any(other.name == entry["name"] for other in made)
        label = f"{entry['name']}_{entry.get('num_fewshot', 0)}shot" if repeated else None
        settings = {
            **entry,
            **({} if limit is None else {"limit": int(limit) if limit.is_integer() else limit}),
        }
        documents = None if data is None else folder_of(data, entry["name"])
        made.append(Task(**settings, data=documents, folder=absolute(folder), allow_code=allow_code, label=label))
    return tuple(made)


def _uploaded(tasks: tuple[Task, ...], root: str, say: Callable[[str], None]) -> tuple[Task, ...]:
    """The tasks with their local documents and definitions copied to the storage."""
    from dataclasses import replace

    from minitron_platform.uploads import with_upload

    copies = {
        path: with_upload(path, "tasks", root, say) for task in tasks for path in (task.data, task.folder) if path
    }
    return tuple(
        replace(task, data=copies.get(task.data or ""), folder=copies.get(task.folder or "")) for task in tasks
    )


def _entries(text: str) -> list[dict[str, Any]]:
    entries = [_entry(each) for each in text.split(",")]
    for entry in entries:
        if (times := entries.count(entry)) > 1:
            name, shots = entry["name"], entry["num_fewshot"]
            raise InputError(
                f"--tasks: {name} is given {times} times with {shots} examples",
                f"give it once, or with different numbers of examples: {name}:{shots},{name}:{shots + 5}",
            )
    return entries


def _entry(text: str) -> dict[str, Any]:
    name, _, shots = text.strip().partition(":")
    if not name or (":" in text and not shots.isdecimal()):
        raise InputError(
            f"--tasks: {text!r} is not a task", "write NAME, or NAME:5 for 5 examples, with commas between"
        )
    return {"name": name, "num_fewshot": int(shots or 0)}


def _check(models: tuple[str, ...], tasks: tuple[Task, ...], tokenizer: str | None, locations: Locations) -> None:
    """Raise InputError for models and tasks that cannot run, before any model is loaded."""
    from minitron.completions import is_served
    from minitron.evaluation import check_ready
    from minitron.models import source_tokenizer

    served = [model for model in models if is_served(model)]
    if served and tokenizer is None:
        raise InputError(
            f"{served[0]}: a server counts tokens that only its tokenizer knows", "give it with --tokenizer DIR"
        )
    longest = check_models(models, locations)
    conversing = any(task.chat_template for task in tasks)
    for model in models:
        source = tokenizer if model in served else model
        if source is None or is_registered(model) or not (model in served or conversing):
            continue
        if conversing and not getattr(source_tokenizer(source), "chat_template", None):
            raise InputError(
                f"{model}: tasks are asked with the chat template, and its tokenizer has none",
                "give an instruct model, or a suite without chat_template",
            )
    check_ready(tasks, longest)
