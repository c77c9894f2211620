"""The commands that move an alias: `minitron promote` and `minitron rollback`."""

from __future__ import annotations

from typing import Any

import click

from minitron_platform.cli.options import UNVERIFIED_HELP, tracking_options
from minitron_platform.console import echo


@click.command()
@click.argument("model")
@click.option("--version", metavar="N", help="Version to promote. [default: the one with the alias 'candidate']")
@click.option("--alias", default="champion", show_default=True, help="Alias to move.")
@click.option("--unverified", is_flag=True, help=UNVERIFIED_HELP)
@tracking_options
def promote(locations: Any, model: str, version: str | None, alias: str, unverified: bool) -> None:
    """Point an alias of MODEL at a version.

    The content of its weights is compared first with what was registered.
    """
    from minitron_platform.tracking.registry import promote as promote_model

    _print_promotion(
        promote_model(
            locations.tracking_uri,
            model,
            version=version,
            alias=alias,
            storage_root=locations.storage,
            unverified=unverified,
        )
    )


@click.command()
@click.argument("model")
@click.option("--alias", default="champion", show_default=True, help="Alias to move.")
@tracking_options
def rollback(locations: Any, model: str, alias: str) -> None:
    """Point an alias of MODEL at its previous version.

    The weights of the version are verified first.
    """
    from minitron_platform.tracking.registry import rollback as roll_back

    _print_promotion(roll_back(locations.tracking_uri, model, alias=alias, storage_root=locations.storage))


def _print_promotion(promotion: Any) -> None:
    before = f" (was version {promotion.previous})" if promotion.previous else ""
    echo(f"{promotion.name}@{promotion.alias} is version {promotion.version}{before}")
