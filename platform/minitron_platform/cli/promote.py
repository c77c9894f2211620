"""The commands that move an alias: `minitron promote` and `minitron rollback`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from minitron_platform.cli.options import UNVERIFIED_HELP, tracking_options
from minitron_platform.console import Console, echo

ON_PROMOTE_HELP = "Run this command after the promotion, or post to this address. [default: none]"
ON_ROLLBACK_HELP = "Run this command after the rollback, or post to this address. [default: none]"


@click.command()
@click.argument("model")
@click.option("--version", metavar="N", help="Version to promote. [default: the one with the alias 'candidate']")
@click.option("--alias", "--to", default="champion", show_default=True, help="Alias to move.")
@click.option("--force", is_flag=True, help="Promote it although gates fail; needs --reason.")
@click.option("--reason", metavar="TEXT", help="Why it is promoted although gates fail; is recorded on the version.")
@click.option("--unverified", is_flag=True, help=UNVERIFIED_HELP)
@click.option("--on-promote", metavar="COMMAND|URL", envvar="MINITRON_ON_PROMOTE", help=ON_PROMOTE_HELP)
@tracking_options
def promote(
    locations: Any,
    model: str,
    version: str | None,
    alias: str,
    force: bool,
    reason: str | None,
    unverified: bool,
    on_promote: str | None,
) -> None:
    """Point an alias of MODEL at a version that passes its gates.

    The content of its weights is compared with what was registered, they are loaded with transformers in a clean process, and
    the version's figures are compared with those of the teacher and of the version that the alias points at. The recipe's
    `register.gates` adds limits. Who promoted it, when, why and what the gates said is recorded on the version.
    """
    from minitron_platform.promotion import GateError, gated_promotion

    console = Console()
    try:
        promotion = gated_promotion(
            locations.tracking_uri,
            model,
            version=version,
            alias=alias,
            storage_root=locations.storage,
            unverified=unverified,
            force=force,
            reason=reason,
            on_promote=on_promote,
            say=echo,
        )
    except GateError as error:
        _show_verdicts(console, error.verdicts)
        raise
    _show_verdicts(console, promotion.verdicts)
    _print_promotion(promotion)


def _show_verdicts(console: Console, verdicts: Sequence[Any]) -> None:
    from rich.table import Table

    table = Table()
    for title in ("gate", "", "measured", "allowed"):
        table.add_column(title)
    for verdict in verdicts:
        table.add_row(verdict.gate, verdict.status, verdict.measured, verdict.limit)
    console.table(table)


@click.command()
@click.argument("model")
@click.option("--alias", default="champion", show_default=True, help="Alias to move.")
@click.option("--on-promote", metavar="COMMAND|URL", envvar="MINITRON_ON_PROMOTE", help=ON_ROLLBACK_HELP)
@tracking_options
def rollback(locations: Any, model: str, alias: str, on_promote: str | None) -> None:
    """Point an alias of MODEL at its previous version.

    The weights of the version are verified first.
    """
    from minitron_platform.promotion import rollback as roll_back

    moved = roll_back(
        locations.tracking_uri,
        model,
        alias=alias,
        storage_root=locations.storage,
        on_promote=on_promote,
        say=echo,
    )
    _print_promotion(moved)


def _print_promotion(promotion: Any) -> None:
    alias = f"{promotion.name}@{promotion.alias}"
    if promotion.previous == promotion.version:
        echo(f"{alias} was already version {promotion.version}")
        return
    before = f" (was version {promotion.previous})" if promotion.previous else ""
    echo(f"{alias} is version {promotion.version}{before}")
