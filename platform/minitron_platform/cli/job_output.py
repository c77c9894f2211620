"""Prints the output of a submitted run."""

from __future__ import annotations

import click

from minitron.text import printable_log
from minitron_platform.cli.program import program
from minitron_platform.console import echo


def follow_job(address: str, job: str, *, insecure: bool) -> int:
    """Print the output of a run until it ends; returns the exit code for its end. Ctrl-C ends the printing, not the run."""
    from minitron_platform.cluster.jobs import exit_code, logs

    try:
        for text in logs(address, job, follow=True, insecure=insecure):
            click.echo(printable_log(text), nl=False)
    except KeyboardInterrupt:
        echo(f"\nthe run continues; to stop it: {program()} stop {job} --address {address}", err=True)
        return 130
    return exit_code(address, job, insecure=insecure)
