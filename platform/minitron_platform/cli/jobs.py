"""The commands about submitted runs: `minitron status`, `logs` and `stop`."""

from __future__ import annotations

import click

from minitron.text import printable_log
from minitron_platform.cli.options import job_options
from minitron_platform.console import echo


@click.command()
@click.argument("job", required=False)
@job_options
def status(job: str | None, address: str, insecure: bool) -> None:
    """Show the state of JOB, or of all submitted runs."""
    from minitron_platform.cluster.jobs import status as job_status

    for row in job_status(address, job, insecure=insecure):
        echo(f"{row.submission_id:<48}{row.status:<12}{row.message or ''}")


@click.command()
@click.argument("job")
@click.option("--follow", "-f", is_flag=True, help="Keep printing until the job ends.")
@job_options
def logs(job: str, follow: bool, address: str, insecure: bool) -> None:
    """Print the output of JOB."""
    from minitron_platform.cluster.jobs import logs as job_logs

    for text in job_logs(address, job, follow, insecure=insecure):
        click.echo(printable_log(text), nl=False)


@click.command()
@click.argument("job")
@job_options
def stop(job: str, address: str, insecure: bool) -> None:
    """Stop JOB. Submitting the same recipe again resumes it."""
    from minitron_platform.cluster.jobs import status as job_status
    from minitron_platform.cluster.jobs import stop as stop_job

    echo(stop_job(address, job, insecure=insecure))
    if resume := job_status(address, job, insecure=insecure)[0].resume:
        echo(f"to resume: {resume}", err=True)
