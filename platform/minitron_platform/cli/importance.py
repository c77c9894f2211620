"""`minitron importance`: what a calibration found, and whether two agree."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape

from minitron_platform.console import Console

SCORES = click.Path(exists=True, path_type=Path)


@click.group()
def importance() -> None:
    """Look at importance scores: a scores.safetensors file, or a storage folder (its newest calibration)."""


@importance.command()
@click.argument("scores", type=SCORES)
@click.option(
    "--plot", metavar="FILE.png", type=click.Path(dir_okay=False, path_type=Path), help="Also draw the curves."
)
def show(scores: Path, plot: Path | None) -> None:
    """Which layers, heads, neurons and channels of SCORES matter."""
    from minitron.importance import ImportanceScores
    from minitron_platform.cli import importance_tables as tables

    console = Console()
    file = scores_file(console, scores)
    loaded = ImportanceScores.load(file)
    console.say(f"[bold]{escape(str(file))}[/]")
    console.say(escape(tables.provenance(loaded)))
    for table in (tables.layers(loaded), tables.blocks(loaded), tables.units(loaded)):
        console.table(table)
    if plot:
        from minitron import storage
        from minitron_platform.cli.importance_plot import draw

        storage.write_bytes(str(plot), draw(loaded))
        console.say(f"drawn in [bold]{escape(str(plot))}[/]")


@importance.command()
@click.argument("first", type=SCORES)
@click.argument("second", type=SCORES)
def compare(first: Path, second: Path) -> None:
    """Do two calibrations of one architecture rank alike? For example a teacher's before and after its correction."""
    from minitron.importance import ImportanceScores
    from minitron_platform.cli import importance_tables as tables

    console = Console()
    a, b = (ImportanceScores.load(scores_file(console, place)) for place in (first, second))
    console.table(tables.agreement(a, b))
    console.table(tables.block_agreement(a, b))


def scores_file(console: Console, place: Path) -> Path:
    """The scores file that a path means; the others of a folder are listed."""
    from minitron.errors import InputError

    if place.is_file():
        return place
    found = sorted(place.glob("stages/calibrate/*/scores.safetensors"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise InputError(
            f"{place}: no stages/calibrate/*/scores.safetensors in it",
            "give a scores.safetensors file, or the storage folder of a run that has calibrated",
        )
    for file in found[:-1]:
        console.say(f"[dim]older: {escape(str(file))}[/]")
    return found[-1]
