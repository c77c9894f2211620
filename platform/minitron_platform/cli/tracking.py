"""The commands about MLflow: `minitron sync` and `minitron ui`."""

from __future__ import annotations

from typing import Any

import click

from minitron.redaction import redact
from minitron_platform.cli.options import tracking_options
from minitron_platform.console import Console, echo


@click.command()
@tracking_options
def sync(locations: Any) -> None:
    """Send to MLflow the records of runs that it lacks.

    Records are kept in the storage until MLflow has them: those of runs that ended while it did not answer, or whose machine
    was lost, are sent by this command from any machine.
    """
    from minitron_platform.sync import sync as sync_records

    sent = sync_records(locations, Console())
    click.echo(f"{sent:,} records sent" if sent else f"nothing to send: no records wait in {redact(locations.storage)}")


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=5000, show_default=True, help="Port to listen on.")
@click.option("--insecure", is_flag=True, help="Allow a host that other machines can reach.")
@click.option("--no-auth", is_flag=True, help="Ask for no password: every user of this machine reads your files.")
@tracking_options
def ui(locations: Any, host: str, port: int, insecure: bool, no_auth: bool) -> None:
    """Start MLflow's web interface for the experiments and models.

    The link that it prints contains your password, which is kept in your cache folder.
    """
    from minitron_platform.tracking.flusher import check_exists
    from minitron_platform.tracking.server import serve

    check_exists(locations.tracking_uri)
    raise SystemExit(
        serve(
            locations.tracking_uri,
            locations.local,
            host=host,
            port=port,
            insecure=insecure,
            auth=not no_auth,
            say=echo,
        )
    )
