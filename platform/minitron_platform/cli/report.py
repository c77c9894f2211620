"""The command `minitron report`."""

from __future__ import annotations

from typing import Any

import click
from rich.markup import escape

from minitron_platform.cli.options import check_out, tracking_options
from minitron_platform.console import Console


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option(
    "--out", type=click.Path(dir_okay=False), help="File to write. [default: report.html of the run's folder]"
)
@tracking_options
def report(locations: Any, runs: tuple[str, ...], out: str | None) -> None:
    """Write the report of a finished run again, or compare several runs on one page, with the aligned and quantised variants
    of their students that are registered.

    RUN is the name of a run, such as smollm2-135m-cpu-720783ab, its recipe's name, of which the newest run is taken, or a model
    of its family. Without RUN, the finished runs of the storage are listed.
    """
    check_out(out)
    from minitron_platform.report.finished_run import finished_runs
    from minitron_platform.report.write import write_page

    console = Console()
    if not runs:
        finished = finished_runs(locations)
        for run in finished:
            console.say(escape(f"{run.key}  {', '.join(run.models)}"))
        if not finished:
            console.say(escape(f"no finished runs in {locations.storage}; `minitron run` makes one"))
        return
    with console.working("report"):
        path = write_page(locations, runs, out)
    console.say(f"The report:\n  [bold]{escape(path)}[/]")
