"""The commands about submitted runs: `minitron jobs`, `status`, `logs`, `stop` and `resume`."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from minitron.text import printable_log
from minitron_platform.cli.job_output import follow_job
from minitron_platform.cli.options import job_options, known_stage
from minitron_platform.cli.program import program
from minitron_platform.console import Console, echo, seconds

if TYPE_CHECKING:
    from minitron_platform.cluster.job_rows import JobRow

JSON_HELP = "Print JSON."


@click.command()
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
@job_options
def jobs(as_json: bool, address: str, insecure: bool) -> None:
    """List the submitted runs, the newest first."""
    from minitron_platform.cluster.jobs import status as job_status

    rows = job_status(address, insecure=insecure)
    if as_json:
        click.echo(json.dumps([_facts(address, row, insecure) for row in rows], indent=2))
        return
    for row in rows:
        echo(f"{row.submission_id:<48}{row.status:<12}{_age(row):<28}{_state(address, row, insecure)}".rstrip())


@click.command()
@click.argument("job", required=False)
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
@job_options
@click.pass_context
def status(context: click.Context, job: str | None, as_json: bool, address: str, insecure: bool) -> None:
    """Show the stage, progress and age of JOB, and why it failed. Without JOB, list all submitted runs."""
    from minitron_platform.cluster.jobs import status as job_status

    if job is None:
        context.invoke(jobs, as_json=as_json, address=address, insecure=insecure)
        return
    (row,) = job_status(address, job, insecure=insecure)
    facts = _facts(address, row, insecure)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    console = Console()
    for name in ("job", "status", "stage", "progress", "reason"):
        if facts[name]:
            age = f", {_age(row)}" if name == "status" else ""
            console.say(f"{name:<10}{escape(facts[name])}{age}")
    if not row.is_active and row.status != "SUCCEEDED":
        console.say(f"resume    {escape(f'{program()} resume {row.submission_id} --address {address}')}")


@click.command()
@click.argument("job")
@click.option("--follow", "-f", is_flag=True, help="Keep printing until the job ends, and exit as it does.")
@click.option("--stage", metavar="NAME", callback=known_stage, help="Only what was printed during this stage.")
@job_options
def logs(job: str, follow: bool, stage: str | None, address: str, insecure: bool) -> None:
    """Print the output of JOB."""
    from minitron_platform.cluster.jobs import logs as job_logs
    from minitron_platform.cluster.jobs import status as job_status

    if follow and stage:
        raise click.UsageError("--stage cannot be used with --follow: a stage's part is known once it has ended")
    if follow:
        (row,) = job_status(address, job, insecure=insecure)
        raise SystemExit(follow_job(address, row.submission_id, insecure=insecure))
    for text in job_logs(address, job, stage=stage, insecure=insecure):
        click.echo(printable_log(text), nl=False)


@click.command()
@click.argument("job")
@job_options
def stop(job: str, address: str, insecure: bool) -> None:
    """Stop JOB. What it has finished is kept, and `minitron resume` continues it."""
    from minitron_platform.cluster.jobs import status as job_status
    from minitron_platform.cluster.jobs import stop as stop_job

    (row,) = job_status(address, job, insecure=insecure)  # when it has ended, its name may be that of several
    echo(stop_job(address, row.submission_id, insecure=insecure))
    echo(f"to resume: {row.resume or f'{program()} resume {row.submission_id} --address {address}'}", err=True)


@click.command()
@click.argument("job")
@click.option("--follow", "-f", is_flag=True, help="Print its output until it ends, and exit as it does.")
@job_options
def resume(job: str, follow: bool, address: str, insecure: bool) -> None:
    """Submit JOB again, with the same recipe and settings; it continues from what is finished.

    The recipe is kept with the job, so its file is not needed. The code is that of this machine.
    """
    from minitron_platform.cluster.job_start import resume as resume_job

    submission = resume_job(address, job, insecure=insecure, say=lambda line: echo(line, err=True))
    echo(submission)
    if follow:
        raise SystemExit(follow_job(address, submission, insecure=insecure))


def _facts(address: str, row: JobRow, insecure: bool) -> dict[str, Any]:
    """What is known of a run, by name; for JSON."""
    from minitron_platform.cluster.jobs import job_progress

    at = job_progress(address, row, insecure=insecure)
    return {
        "job": row.submission_id,
        "name": row.name,
        "status": row.status,
        "stage": at.stage,
        "progress": at.status or (row.message if row.status == "PENDING" else ""),
        "reason": row.reason,
        "started": row.started,
        "ended": row.ended,
        "attempt": row.attempt,
        "version": row.version,
        "resume": row.resume,
    }


def _state(address: str, row: JobRow, insecure: bool) -> str:
    """The progress of an active run, or why one has failed."""
    if not row.is_active:
        return row.reason
    from minitron_platform.cluster.jobs import job_progress

    return str(job_progress(address, row, insecure=insecure)) or row.message


def _age(row: JobRow) -> str:
    """For example "for 12 min 03 s" or "2 h 05 min ago, took 40 s"."""
    if row.started is None:
        return ""
    now = time.time()
    if row.ended is None:
        return f"for {seconds(now - row.started)}"
    return f"{seconds(now - row.ended)} ago, took {seconds(row.ended - row.started)}"
