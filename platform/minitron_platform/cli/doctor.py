"""The command `minitron doctor`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from minitron.text import printable_log
from minitron_platform.cli.options import INSECURE_HELP, STORAGE_HELP, TRACKING_HELP
from minitron_platform.console import Console, echo

if TYPE_CHECKING:
    from minitron_platform.doctor.finding import Finding

# in a log that has lines of Ray and of libraries too
PRINTED_JSON = re.compile(r"^\[$.*?^\]$", re.MULTILINE | re.DOTALL)
COLOURS = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "dim"}


@click.command()
@click.option("--storage", "storage_path", metavar="PATH", envvar="MINITRON_STORAGE", help=STORAGE_HELP)
@click.option("--tracking-uri", metavar="URI", envvar="MLFLOW_TRACKING_URI", help=TRACKING_HELP)
@click.option(
    "--address",
    metavar="ADDRESS",
    help="Check the nodes of this cluster: HOST:6379, or its Jobs API, http://HOST:8265. [default: this machine]",
)
@click.option("--insecure", is_flag=True, help=INSECURE_HELP)
@click.option(
    "--calibrate",
    is_flag=True,
    help="Measure how fast models are on this machine, which takes about a minute, for the times of `minitron plan`.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(
    storage_path: str | None,
    tracking_uri: str | None,
    address: str | None,
    insecure: bool,
    calibrate: bool,
    as_json: bool,
) -> None:
    """Check this machine, or a cluster, before a run does.

    Versions, GPUs, drivers and the bandwidth between them, the storage from every node, MLflow, clocks, shared memory, open
    files, temporary space and tokens. Exits with 1 if a check has failed.
    """
    if calibrate:
        if address:
            raise click.UsageError("--calibrate is for this machine, and cannot be used with --address")
        _calibrate(as_json)
        return
    if address and address.startswith(("http://", "https://")):
        raise SystemExit(_as_job(address, insecure, storage_path, tracking_uri, as_json))
    from minitron_platform.doctor.examine import findings
    from minitron_platform.doctor.finding import has_failed
    from minitron_platform.locations import resolve_locations

    console = Console()
    seen: list[Finding] = []
    locations = resolve_locations(storage_path, tracking_uri)
    if as_json:
        seen = list(findings(locations, address))
        click.echo(json.dumps([asdict(finding) for finding in seen], indent=2))
    else:
        with console.working("checking"):
            for finding in findings(locations, address):
                seen.append(finding)
                console.status(f"{finding.check} of {finding.where}")
        _show(console, seen)
    raise SystemExit(1 if has_failed(seen) else 0)


def _calibrate(as_json: bool) -> None:
    from minitron.device import compute_dtype
    from minitron_platform.doctor.calibrate import calibrate

    console = Console()
    dtype = compute_dtype()
    if as_json:
        click.echo(json.dumps(asdict(calibrate(dtype)), indent=2))
        return
    with console.working("measuring"):
        speed = calibrate(dtype)
    name = str(dtype).removeprefix("torch.")
    for what, flops in (("forward passes", speed.forward), ("training", speed.training)):
        console.say(f"{what:<16}{flops / 1e9:,.0f} GFLOP/s in {name}, on each CPU core or GPU")


def _show(console: Console, seen: Iterable[Finding]) -> None:
    """Print a table, with the remedy below every finding that needs one."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for title in ("check", "where", "", "what"):
        table.add_column(title)
    for finding in seen:
        what = Text(finding.value)
        if finding.remedy:
            what.append(f"\nfix: {finding.remedy}", "bold")
        table.add_row(finding.check, finding.where, Text(finding.state, COLOURS[finding.state]), what)
    console.table(table)


def _as_job(address: str, insecure: bool, storage_path: str | None, tracking_uri: str | None, as_json: bool) -> int:
    """Check a cluster by a job on it; returns the exit code."""
    import shlex

    from minitron_platform.cli.job_output import follow_job
    from minitron_platform.cluster.job_start import JobNeeds, checked, submit_text
    from minitron_platform.cluster.jobs import exit_code, logs
    from minitron_platform.cluster.requirements import extras_for

    needs = JobNeeds("image", tuple(extras_for([storage_path or "", tracking_uri or ""])))
    words = ["python", "-m", "minitron_platform", "doctor"]
    words += ["--storage", storage_path] if storage_path else []
    words += ["--tracking-uri", tracking_uri] if tracking_uri else []
    words += ["--json"] if as_json else []
    job = submit_text(
        "",
        name="doctor",
        address=address,
        entrypoint=shlex.join(words),
        needs=checked(needs, address=address, insecure=insecure),
        insecure=insecure,
        say=lambda line: echo(line, err=True),
    )
    if as_json:
        log = "".join(logs(address, job, follow=True, insecure=insecure))
        found = PRINTED_JSON.search(log)
        click.echo(found[0] if found else printable_log(log), err=not found)  # without findings the log says why
        return exit_code(address, job, insecure=insecure)
    return follow_job(address, job, insecure=insecure)
