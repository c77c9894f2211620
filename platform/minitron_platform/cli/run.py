"""The command `minitron run`."""

from __future__ import annotations

import shlex
from typing import Any

import click
from rich.markup import escape

from minitron import __version__
from minitron.garbage import collector_off
from minitron.storage import redact
from minitron_platform.cli.options import TAKE_OVER_HELP, UPLOAD_HELP, known_stage, recipe_options
from minitron_platform.cli.plan import checked_plan
from minitron_platform.cli.plan_tables import show_plan
from minitron_platform.cli.program import command_line, program
from minitron_platform.console import Console, seconds


@click.command()
@recipe_options
@click.option(
    "--address", metavar="ADDRESS", help="Address of a running Ray cluster. [default: a private Ray on this machine]"
)
@click.option("--until", metavar="STAGE", callback=known_stage, help="Stop after this stage: --until search.")
@click.option("--take-over", is_flag=True, help=TAKE_OVER_HELP)
@click.option("--upload", is_flag=True, help=UPLOAD_HELP)
def run(
    recipe: str,
    overrides: tuple[str, ...],
    storage_path: str | None,
    tracking_uri: str | None,
    address: str | None,
    until: str | None,
    take_over: bool,
    upload: bool,
) -> None:
    """Run RECIPE on this machine. Finished stages are reused, interrupted ones are resumed."""
    import time

    started = time.monotonic()
    console = Console(command_line())
    console.say(f"[bold]Minitron {__version__}[/]  {escape(recipe)}")
    from minitron_platform.recipes.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    if upload:
        loaded = _uploaded(console, loaded, storage_path, tracking_uri)
    with console.working("starting"), collector_off():
        from minitron_platform.pipeline import has_run
        from minitron_platform.pipeline import run as run_pipeline
        from minitron_platform.report.final_table import final_table

        finished = has_run(loaded, storage_path, tracking_uri, address)
    planned = None
    if not finished:
        planned = checked_plan(console, loaded, storage_path, tracking_uri, address)
        show_plan(console, loaded, planned, candidates=False)
    result = run_pipeline(
        loaded,
        storage_path=storage_path,
        tracking_uri=tracking_uri,
        address=address,
        until=until,
        take_over=take_over,
        console=console,
        planned=planned,
    )
    if not result.is_complete:
        return
    console.say()
    console.table(final_table(result.state))
    typed = program()
    options = f" --storage {shlex.quote(storage_path)}" if storage_path else ""
    options += f" --tracking-uri {shlex.quote(redact(tracking_uri))}" if tracking_uri else ""
    students = result.students
    console.say(f"\nThe student{'s' if len(students) > 1 else ''}, as plain transformers checkpoints:")
    for student in students:
        console.say(f"  [bold]{escape(student.path)}[/]")
    console.say(f"The report:\n  [bold]{escape(str(result.report))}[/]")
    console.say(f"Open the experiment in MLflow:\n  [bold]{escape(typed + ' ui' + options)}[/]")
    registered = [student for student in students if student.version is not None]
    if registered:
        console.say("Promote a student:" if len(registered) > 1 else "Promote the student:")
    for student in registered:
        arguments = f"{student.model} --version {student.version}"
        console.say(f"  [bold]{escape(f'{typed} promote {arguments}{options}')}[/]")
    console.say(f"[dim]total time {seconds(time.monotonic() - started)}[/]")


def _uploaded(console: Console, recipe: Any, storage_path: str | None, tracking_uri: str | None) -> Any:
    """The recipe with its local files copied to the storage."""
    from minitron_platform.locations import resolve_locations
    from minitron_platform.uploads import with_uploads

    root = resolve_locations(storage_path, tracking_uri).storage
    return with_uploads(recipe, root, lambda line: console.say(escape(line)))
