"""The command `minitron dashboards`: the Grafana dashboard and the Prometheus alerts of runs."""

from __future__ import annotations

import os

import click

from minitron_platform.console import echo


@click.group()
def dashboards() -> None:
    """Show what runs do in Grafana, and let Prometheus raise alerts.

    The metrics are those that Ray exports while a run computes: minitron's own and Ray's of its nodes.
    """


@dashboards.command()
@click.argument("folder", type=click.Path(file_okay=False))
def export(folder: str) -> None:
    """Write the dashboard and the alerts to FOLDER, with configurations of Grafana and Prometheus that read them."""
    from minitron_platform.dashboards import export_dashboards

    for path in export_dashboards(folder):
        echo(str(path))


@dashboards.command()
@click.argument("address", metavar="URL")
@click.option("--insecure", is_flag=True, help="Allow an unencrypted address of another machine.")
def install(address: str, insecure: bool) -> None:
    """Create the dashboard in the Grafana at URL, or replace it by this version's.

    GRAFANA_TOKEN is the token of a service account of that Grafana which may edit dashboards. The alerts are Prometheus's: give
    it the file that `export` writes.
    """
    from minitron_platform.dashboards import install_dashboard

    echo(f"The dashboard is at {install_dashboard(address, os.environ.get('GRAFANA_TOKEN', ''), insecure=insecure)}")
