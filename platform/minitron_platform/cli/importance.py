"""`minitron importance`: shows the scores of a calibration, and compares those of two."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape

from minitron_platform.console import Console

SCORES = click.Path(exists=True, path_type=Path)


@click.group()
def importance() -> None:
    """Show or compare importance scores.

    SCORES is a scores.safetensors file, or a storage folder, whose newest calibration is used.
    """


@importance.command()
@click.argument("scores", type=SCORES)
@click.option(
    "--plot",
    metavar="FILE.png",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also plot the scores to this file.",
)
def show(scores: Path, plot: Path | None) -> None:
    """Show how important layers, heads, neurons and channels are."""
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
        console.say(f"plotted to [bold]{escape(str(plot))}[/]")


@importance.command()
@click.argument("first", type=SCORES)
@click.argument("second", type=SCORES)
def compare(first: Path, second: Path) -> None:
    """Compare the rankings of two calibrations.

    FIRST and SECOND must be of the same architecture, for example the teacher before and after its correction.
    """
    from minitron.importance import ImportanceScores
    from minitron_platform.cli import importance_tables as tables

    console = Console()
    a, b = (ImportanceScores.load(scores_file(console, path)) for path in (first, second))
    console.table(tables.agreement(a, b))
    console.table(tables.block_agreement(a, b))


def scores_file(console: Console, path: Path) -> Path:
    """The scores file at `path`: the file itself, or the newest one of a storage folder; prints the older ones.

    Raises InputError for a folder without scores.
    """
    newest, *others = calibrations(path)
    for file in others:
        console.say(f"[dim]older: {escape(str(file))}[/]")
    return newest


def calibrations(path: Path) -> list[Path]:
    """The scores files at `path`: the file itself, or those of a storage folder, the newest first.

    Raises InputError for a folder without scores.
    """
    from minitron.errors import InputError

    if path.is_file():
        return [path]
    files = sorted(path.glob("stages/calibrate/*/scores.safetensors"), key=lambda file: -file.stat().st_mtime)
    if not files:
        raise InputError(
            f"{path}: the folder has no stages/calibrate/*/scores.safetensors",
            "give a scores.safetensors file, or the storage of a run that has finished its calibrate stage",
        )
    return files
