"""`minitron prune`: a smaller checkpoint from a checkpoint and its importance scores."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from minitron import storage
from minitron.architecture import AXES
from minitron.errors import InputError
from minitron_platform.cli.prune_request import Request, layer_numbers, ranges
from minitron_platform.cli.prune_sources import CONFIG, HUB_FILES, check_scores, local_model, local_scores
from minitron_platform.console import Console, seconds

if TYPE_CHECKING:
    from minitron.architecture import Architecture
    from minitron.importance import ImportanceScores


def _size_options(command: Callable[..., None]) -> Callable[..., None]:
    """An option for the size of every axis."""
    for axis in reversed(AXES):
        help_text = f"Number of {axis.plural} to keep."
        command = click.option(f"--{axis.name.replace('_', '-')}", type=int, metavar="N", help=help_text)(command)
    return command


@click.command(short_help="Cut a smaller checkpoint out of MODEL.")
@click.argument("model")
@click.argument("out")
@click.option("--revision", metavar="REV", help="Commit, branch or tag of a hub model. [default: the newest]")
@click.option(
    "--scores", required=True, metavar="FILE", help="Importance scores of MODEL, or the storage of the run they are in."
)
@click.option("--like", metavar="NAME", help="The shape of a published Minitron, such as mn-minitron-8b.")
@click.option("--parameters", type=float, metavar="N", help="The shape for about this many parameters: 4.5e9.")
@click.option(
    "--how",
    type=click.Choice(["width", "depth", "both"]),
    help="What --parameters shrinks. [default: width]",
)
@click.option(
    "--multiple",
    type=click.IntRange(1),
    help="--parameters: widths are multiples of this. [default: 64]",
)
@_size_options
@click.option("--layers", metavar="RANGES", help="Exactly these layers stay, counted from 0: 0-14,31.")
@click.option(
    "--depth",
    type=click.Choice(["contiguous", "scattered", "iterative"]),
    help="How the scores choose layers. [default: contiguous]",
)
@click.option("--metric", metavar="NAME", help="The layer score to use. [default: loss where measured, else cosine]")
@click.option(
    "--merge-heads",
    type=click.Choice(["+1", "-1"]),
    help="Merge removed query heads into kept ones, with this sign. [default: off]",
)
def prune(
    model: str,
    out: str,
    revision: str | None,
    scores: str,
    like: str | None,
    parameters: float | None,
    how: str | None,
    multiple: int | None,
    layers: str | None,
    depth: str | None,
    metric: str | None,
    merge_heads: str | None,
    **sizes: int | None,
) -> None:
    """Cut a smaller checkpoint out of MODEL and write it to OUT, a new folder.

    MODEL is a checkpoint folder, a hub name, a .gguf file or package:NAME/PATH. A folder or hub model is read and written
    one tensor at a time, so it may be larger than memory; a .gguf file is loaded whole.

    The shape is given in one of three ways: sizes (--hidden-size 3072 --intermediate-size 9216, what is not named stays),
    --parameters, or --like.

    \b
    minitron prune ./Llama-3.1-8B ./4b --scores scores.safetensors --like llama-3.1-minitron-4b-width
    minitron prune ./Llama-3.1-8B ./6b --scores scores.safetensors --parameters 6e9 --how both
    minitron prune ./Llama-3.1-8B ./deep --scores scores.safetensors --layers 0-14,31
    """
    started = time.monotonic()
    console = Console()
    if storage.exists(out):
        raise InputError(f"{out} exists", "give a new folder, or delete it")
    asked = Request(
        {name: size for name, size in sizes.items() if size is not None},
        parameters,
        how,
        multiple,
        like,
        None if layers is None else layer_numbers(layers),
        depth,
        metric,
    )
    file = local_scores(scores, console)
    console.say(f"scores  {escape(str(file))}")
    with console.working("reading"):
        from minitron.architecture.hardware import hardware_notes
        from minitron.importance import ImportanceScores
        from minitron.models import check_contents, source_architecture

        found = ImportanceScores.load(file)
        base, _ = source_architecture(local_model(model, revision, CONFIG))
    check_scores(found, base, file)
    target = asked.shape(base)
    kept, chosen = asked.kept(found, base, target)
    console.table(_shapes(base, target))
    if parameters:
        console.say(f"{target.num_parameters / parameters - 1:+.1%} of the {parameters:,.0f} parameters asked for")
    if len(kept) < base.num_layers:
        console.say(f"layers kept: {ranges(kept)} ({escape(chosen)})")
    for note in hardware_notes(base, target):
        console.say(f"[yellow]note[/]  {escape(note)}")
    check_contents(model, revision)
    with console.working("downloading"):
        place = local_model(model, revision, HUB_FILES)
    sign = int(merge_heads or 0)
    if place.endswith(".gguf"):
        console.say(f"{escape(model)} is loaded whole, in float32")
        _prune_in_memory(console, place, out, target, found, kept, sign)
    else:
        console.say(f"{escape(place)} is read one tensor at a time")
        from minitron.pruning.streaming import prune_checkpoint

        with console.working("pruning"):
            count = console.counter("tensors")
            prune_checkpoint(place, out, target, found, layers=kept, merge_heads=sign, progress=count)
    console.say(f"[dim]{seconds(time.monotonic() - started)} · peak memory {_peak_gigabytes():.1f} GB[/]")
    console.say(f"The pruned model, a plain transformers checkpoint:\n  [bold]{escape(storage.absolute(out))}[/]")


def _shapes(base: Architecture, target: Architecture) -> Table:
    table = Table()
    for title, side in (("", "left"), ("model", "right"), ("pruned", "right"), ("", "right")):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    rows: list[tuple[str, Any, Any]] = [
        (name.replace("_", " "), size, getattr(target, name)) for name, size in base.sizes.items()
    ]
    rows.append(("parameters", base.num_parameters, target.num_parameters))
    for title, before, after in rows:
        table.add_row(title, f"{before:,}", f"{after:,}", f"{after / before:.0%}" if after < before else "")
    return table


def _prune_in_memory(
    console: Console, source: str, out: str, target: Architecture, scores: ImportanceScores, kept: list[int], sign: int
) -> None:
    from minitron.models import load_source, save_model
    from minitron.pruning import prune as prune_model

    with console.working("pruning"):
        console.status("loading")
        loaded, tokenizer = load_source(source)
        console.status("cutting")
        student = prune_model(loaded, target, scores, layers=kept, merge_heads=sign)
        console.status("writing")
        with storage.committed_folder(
            out, {"architecture": target.to_dict(), "layers": kept, "scores": scores.provenance}
        ) as place:
            save_model(student, tokenizer, place)


def _peak_gigabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
