"""`minitron prune`: prunes a checkpoint by its importance scores."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from minitron import storage
from minitron.architecture import AXES
from minitron.errors import InputError
from minitron_platform.cli.prune_request import Request, layer_numbers, ranges
from minitron_platform.cli.prune_sources import (
    CONFIG,
    HUB_FILES,
    check_outside,
    check_same_model,
    choose_scores,
    local_model,
    local_scores,
    sample_of,
)
from minitron_platform.console import Console, seconds

if TYPE_CHECKING:
    from minitron.architecture import Architecture
    from minitron.importance import ImportanceScores


def _size_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for the size of every axis."""
    for axis in reversed(AXES):
        help_text = f"Number of {axis.plural} to keep."
        command = click.option(f"--{axis.name.replace('_', '-')}", type=int, metavar="N", help=help_text)(command)
    return command


@click.command(short_help="Prune MODEL to a smaller checkpoint.")
@click.argument("model")
@click.argument("out")
@click.option("--revision", metavar="REV", help="Commit, branch or tag of a hub model. [default: the newest]")
@click.option(
    "--scores",
    required=True,
    metavar="FILE",
    help="Importance scores of MODEL, or the storage of the run that computed them.",
)
@click.option("--like", metavar="NAME", help="Use the shape of a published Minitron, such as mn-minitron-8b.")
@click.option(
    "--parameters", type=float, metavar="N", help="Choose a shape with about this number of parameters: 4.5e9."
)
@click.option(
    "--how",
    type=click.Choice(["width", "depth", "both"]),
    help="Dimensions that --parameters reduces. [default: width]",
)
@click.option(
    "--multiple",
    type=click.IntRange(1),
    help="Widths that --parameters chooses are multiples of this. [default: 64]",
)
@_size_options
@click.option("--layers", metavar="RANGES", help="Keep exactly these layers, numbered from 0: 0-14,31.")
@click.option(
    "--depth",
    type=click.Choice(["contiguous", "scattered", "iterative"]),
    help="How layers are chosen by their scores. [default: contiguous]",
)
@click.option(
    "--metric", metavar="NAME", help="Layer score to use. [default: loss if it was measured, otherwise cosine]"
)
@click.option(
    "--merge-heads",
    type=click.Choice(["+1", "-1"]),
    help="Add removed query heads to kept ones, with this sign. [default: off]",
)
@click.option("--allow-other-scores", is_flag=True, help="Accept scores of a model of this shape with other weights.")
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
    allow_other_scores: bool,
    **sizes: int | None,
) -> None:
    """Prune MODEL to a smaller checkpoint and write it to OUT, a new folder.

    MODEL is a checkpoint folder, a hub name, a .gguf file, package:NAME/PATH, or the address of a model that Minitron wrote to
    remote storage, such as a student; OUT may be remote too. A folder or hub model is read and written one tensor at a time,
    so it may be larger than the memory; a .gguf file is loaded as a whole.

    Give the new shape in one of three ways: by sizes (--hidden-size 3072 --intermediate-size 9216; sizes that are not given
    do not change), by --parameters, or by --like.

    \b
    minitron prune ./Llama-3.1-8B ./4b --scores scores.safetensors --like llama-3.1-minitron-4b-width
    minitron prune ./Llama-3.1-8B ./6b --scores scores.safetensors --parameters 6e9 --how both
    minitron prune ./Llama-3.1-8B ./deep --scores scores.safetensors --layers 0-14,31
    """
    started = time.monotonic()
    console = Console()
    if not out.strip():
        raise InputError("OUT: is empty", "give a new folder")
    if storage.exists(out):
        raise InputError(f"{out} exists", "give a new folder, or delete it")
    check_outside(model, out)
    request = Request(
        sizes={name: size for name, size in sizes.items() if size is not None},
        parameters=parameters,
        how=how,
        multiple=multiple,
        like=like,
        layers=None if layers is None else layer_numbers(layers),
        depth=depth,
        metric=metric,
    )
    files = local_scores(scores)
    with console.working("reading"):
        from minitron.architecture.hardware import hardware_notes
        from minitron.models import check_contents, source_architecture

        config = local_model(model, revision, CONFIG)
        base, _ = source_architecture(config)
        check_contents(model, revision)
        loaded_scores, file = choose_scores(files, base, sample_of(config))
    console.say(f"scores  {escape(str(file))}")
    for other in files:
        if other != file:
            console.say(f"[dim]not used: {escape(str(other))}[/]")
    target = request.shape(base)
    kept, reason = request.layers_to_keep(loaded_scores, base, target)
    console.table(_shapes(base, target))
    if parameters:
        console.say(
            f"{target.num_parameters / parameters - 1:+.1%} compared to the requested {parameters:,.0f} parameters"
        )
    if len(kept) < base.num_layers:
        console.say(f"layers kept: {ranges(kept)} ({escape(reason)})")
    for note in hardware_notes(base, target):
        console.say(f"[yellow]note[/]  {escape(note)}")
    with console.working("downloading"):
        source = local_model(model, revision, HUB_FILES)

    def compare(sample: str) -> None:
        if note := check_same_model(loaded_scores, sample, file, allow_other=allow_other_scores):
            console.say(f"[yellow]note[/]  {escape(note)}")

    sign = int(merge_heads or 0)
    if source.endswith(".gguf"):
        console.say(f"{escape(model)} is loaded as a whole, in float32")
        _prune_in_memory(console, source, out, target, loaded_scores, kept, sign, compare)
    else:
        from minitron.checkpoints.sample import checkpoint_sample

        compare(checkpoint_sample(Path(source)))
        console.say(f"{escape(source)} is read one tensor at a time")
        from minitron.pruning.streaming import prune_checkpoint

        with console.working("pruning"):
            count = console.counter("tensors")
            prune_checkpoint(source, out, target, loaded_scores, layers=kept, merge_heads=sign, progress=count)
    console.say(f"[dim]{seconds(time.monotonic() - started)} · peak memory {_peak_gigabytes():.1f} GB[/]")
    console.say(f"The pruned model, a plain transformers checkpoint:\n  [bold]{escape(storage.absolute(out))}[/]")


def _shapes(base: Architecture, target: Architecture) -> Table:
    """The sizes of both architectures, and their ratio for those that differ."""
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
    console: Console,
    source: str,
    out: str,
    target: Architecture,
    scores: ImportanceScores,
    kept: list[int],
    sign: int,
    compare: Callable[[str], None],
) -> None:
    """Prune a model that has to be loaded as a whole. kept: its layers that are kept. sign: of merged heads; 0 for none.
    compare: refuses the sample of another model's weights."""
    from minitron.checkpoints.sample import model_sample
    from minitron.models import load_source, save_model
    from minitron.pruning import prune as prune_model

    with console.working("pruning"):
        console.status("loading")
        loaded, tokenizer = load_source(source)
        compare(model_sample(loaded))
        console.status("pruning")
        student = prune_model(loaded, target, scores, layers=kept, merge_heads=sign)
        console.status("writing")
        with storage.committed_folder(
            out, {"architecture": target.to_dict(), "layers": kept, "scores": scores.provenance}, new=True
        ) as folder:
            save_model(student, tokenizer, folder)


def _peak_gigabytes() -> float:
    """The largest main memory that this process has used, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
