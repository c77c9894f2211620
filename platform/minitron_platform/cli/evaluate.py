"""`minitron evaluate`: benchmark scores of models on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from minitron.errors import InputError
from minitron_platform.cli.model_sources import MODEL_HELP, SERVER_HELP, dtype_option, engine_option, is_registered
from minitron_platform.cli.options import tracking_options
from minitron_platform.console import Console

if TYPE_CHECKING:
    from minitron.evaluation import Task
    from minitron_platform.locations import Locations

DEFAULT_SUITE = "quick"
SHOWN_CHARACTERS = 1_000  # of a prompt or an answer in the terminal


@click.command(epilog=f"{MODEL_HELP} {SERVER_HELP}")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--suite", metavar="NAME", help="Tasks of a suite: minitron-base, minitron-instruct, quick. [default: quick]"
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
    engine: str,
    dtype: str,
) -> None:
    """Score models on benchmarks, on this machine or at a server.

    Answers are kept in the storage: an evaluation that was stopped is resumed, and a repeated one computes nothing again.

    \b
    minitron evaluate ./student --suite minitron-base --data benchmarks --allow-code --out student.json
    minitron evaluate ./teacher ./student --tasks hellaswag:10,arc_challenge:25 --limit 500
    minitron evaluate smollm2-90m@champion --samples 5
    """
    from minitron import storage
    from minitron.evaluation.result_file import results_json
    from minitron.evaluation.suites import suite as named_suite

    if suite and tasks:
        raise InputError("--suite and --tasks: both were given", "give one of them")
    chosen = None if tasks else named_suite(suite or DEFAULT_SUITE)
    wanted = requested_tasks(
        None if chosen is None else chosen.name, tasks, data, limit, folder=task_folder, allow_code=allow_code
    )
    if len(set(models)) < len(models):
        raise InputError("MODEL: one is given twice", "give each once")
    console = Console()
    _check(models, wanted, tokenizer)
    console.say(f"{len(wanted)} tasks: {escape(', '.join(task.key for task in wanted))}")
    if plan_only:
        return
    from minitron_platform.cli.scoring import Scoring

    scoring = Scoring(console, wanted, locations, dtype, batch_rows, samples, tokenizer, engine)
    results = [scoring.score(model) for model in models]
    from minitron_platform.cli.evaluation_tables import sample_lines, score_table

    console.table(score_table(results))
    for line in sample_lines(results, SHOWN_CHARACTERS) if samples else ():
        console.say(line)
    if out:
        named = None if chosen is None else {"name": chosen.name, "version": chosen.version}
        storage.write_json(out, results_json(results, wanted, named))
        console.say(f"written to [bold]{escape(out)}[/]; compare files with `minitron compare`")
    if any(result.failures for result in results):
        raise SystemExit(1)


def requested_tasks(
    suite: str | None,
    tasks: str | None,
    data: str | None,
    limit: float | None,
    *,
    folder: str | None,
    allow_code: bool,
) -> tuple[Task, ...]:
    """The tasks of a suite, or those that `tasks` lists as NAME or NAME:SHOTS. Raises InputError for another list."""
    from minitron.evaluation import Task
    from minitron.evaluation.suites import folder_of, settings_of

    entries: list[dict[str, Any]] = settings_of(suite) if suite else [_entry(each) for each in (tasks or "").split(",")]
    made: list[Task] = []
    for entry in entries:
        repeated = any(other.name == entry["name"] for other in made)
        label = f"{entry['name']}_{entry.get('num_fewshot', 0)}shot" if repeated else None
        settings = {
            **entry,
            **({} if limit is None else {"limit": int(limit) if limit >= 1 and limit % 1 == 0 else limit}),
        }
        documents = None if data is None else folder_of(data, entry["name"])
        made.append(Task(**settings, data=documents, folder=folder, allow_code=allow_code, label=label))
    return tuple(made)


def _entry(text: str) -> dict[str, Any]:
    name, _, shots = text.strip().partition(":")
    if not name or (":" in text and not shots.isdecimal()):
        raise InputError(
            f"--tasks: {text!r} is not a task", "write NAME, or NAME:5 for 5 examples, with commas between"
        )
    return {"name": name, **({"num_fewshot": int(shots)} if shots else {})}


def _check(models: tuple[str, ...], tasks: tuple[Task, ...], tokenizer: str | None) -> None:
    """Raise InputError for tasks that cannot run, before any model is loaded."""
    from minitron.completions import is_served
    from minitron.evaluation import check_requirements, check_tasks
    from minitron.models import check_source, source_architecture

    check_tasks(tasks)
    longest: list[int] = []
    served = [model for model in models if is_served(model)]
    if served and tokenizer is None:
        raise InputError(
            f"{served[0]}: a server counts tokens that only its tokenizer knows", "give it with --tokenizer DIR"
        )
    for model in models:
        if not (model in served or is_registered(model)):
            check_source(model)
            _, length = source_architecture(model)
            longest += [length] if length else []
    for task in tasks:
        check_requirements(task, min(longest, default=None))
