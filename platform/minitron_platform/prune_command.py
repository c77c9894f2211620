"""`minitron prune`: a smaller checkpoint from a checkpoint and its importance scores."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from minitron import storage
from minitron.errors import InputError
from minitron_platform.console import Console, seconds

if TYPE_CHECKING:
    from minitron.architecture import Architecture
    from minitron.importance import ImportanceScores

SIZES = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "num_experts")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]


@click.command(short_help="Cut a smaller checkpoint out of MODEL.")
@click.argument("model")
@click.argument("out")
@click.option("--scores", required=True, metavar="FILE", help="Importance scores of MODEL (scores.safetensors).")
@click.option("--like", metavar="NAME", help="The shape of a published Minitron, such as mn-minitron-8b.")
@click.option("--parameters", type=float, metavar="N", help="The shape for about this many parameters: 4.5e9.")
@click.option(
    "--how",
    type=click.Choice(["width", "depth", "both"]),
    default="width",
    show_default=True,
    help="What --parameters shrinks.",
)
@click.option(
    "--multiple",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="--parameters: widths are multiples of this.",
)
@click.option("--num-layers", type=int, metavar="N", help="Layers that stay.")
@click.option("--hidden-size", type=int, metavar="N", help="Embedding channels that stay.")
@click.option("--intermediate-size", type=int, metavar="N", help="MLP neurons that stay (of each expert).")
@click.option("--num-heads", type=int, metavar="N", help="Query heads that stay.")
@click.option("--num-kv-heads", type=int, metavar="N", help="KV heads that stay.")
@click.option("--num-experts", type=int, metavar="N", help="Experts that stay.")
@click.option("--layers", metavar="RANGES", help="Exactly these layers stay, counted from 0: 0-14,31.")
@click.option(
    "--depth",
    type=click.Choice(["contiguous", "scattered", "iterative"]),
    default="contiguous",
    show_default=True,
    help="How the scores choose layers.",
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
    scores: str,
    like: str | None,
    parameters: float | None,
    how: str,
    multiple: int,
    layers: str | None,
    depth: str,
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
    asked = _Asked({name: size for name, size in sizes.items() if size is not None}, parameters, how, multiple, like)
    explicit = _layer_numbers(layers) if layers else None
    asked.check(explicit)
    if not storage.exists(scores):
        raise InputError(
            f"--scores: {scores} does not exist", "calibrate first: `minitron run RECIPE --until calibrate`"
        )
    with console.working("reading"):
        from minitron.hardware import hardware_notes
        from minitron.importance import ImportanceScores
        from minitron.models import source_architecture
        from minitron.selection import kept_layers

        found = ImportanceScores.load(storage.fetch_file(scores))
        place = _local(model, console)
        base, _ = source_architecture(place)
    target = asked.shape(base, explicit)
    _check_scores(found, base, scores)
    kept = explicit or kept_layers(found, base.num_layers, target.num_layers, how=depth, metric=metric)
    target.check_inside(base)
    console.table(_shapes(base, target))
    if parameters:
        console.say(f"{target.num_parameters / parameters - 1:+.1%} of the {parameters:,.0f} parameters asked for")
    if len(kept) < base.num_layers:
        console.say(f"layers kept: {_ranges(kept)}")
    for note in hardware_notes(base, target):
        console.say(f"[yellow]note[/]  {escape(note)}")
    sign = int(merge_heads or 0)
    if place.endswith(".gguf"):
        console.say(f"{escape(model)} is loaded whole, in float32")
        _prune_in_memory(console, place, out, target, found, kept, sign)
    else:
        console.say(f"{escape(place)} is read one tensor at a time")
        from minitron.streaming import prune_checkpoint

        with console.working("pruning"):
            count = console.counter("tensors")
            prune_checkpoint(place, out, target, found, layers=kept, merge_heads=sign, progress=count)
    console.say(f"[dim]{seconds(time.monotonic() - started)} · peak memory {_peak_gigabytes():.1f} GB[/]")
    console.say(f"The pruned model, a plain transformers checkpoint:\n  [bold]{escape(storage.absolute(out))}[/]")


@dataclass(frozen=True)
class _Asked:
    """The shape as the user gave it."""

    sizes: dict[str, int]
    parameters: float | None
    how: str
    multiple: int
    like: str | None

    def check(self, layers: Sequence[int] | None) -> None:
        """Raise InputError unless it is given in exactly one way."""
        ways = {
            "--like": self.like,
            "--parameters": self.parameters,
            " ".join(f"--{name.replace('_', '-')}" for name in self.sizes): self.sizes,
        }
        given = [name for name, value in ways.items() if value]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} give the shape twice", "keep one of them")
        if not given and layers is None:
            raise InputError(
                "no shape is given",
                "add --hidden-size and the like, --parameters N, --like NAME, or --layers RANGES",
            )

    def shape(self, base: Architecture, layers: Sequence[int] | None) -> Architecture:
        """The architecture to cut out of `base`; listed layers also say how many there are."""
        from minitron.published import published
        from minitron.shapes import architecture_for

        if self.like:
            return published(self.like, base)
        if self.parameters:
            return architecture_for(base, round(self.parameters), how=self.how, multiple=self.multiple)
        return replace(base, **({"num_layers": len(layers)} if layers else {}) | self.sizes)  # type: ignore[arg-type]


def _layer_numbers(text: str) -> list[int]:
    """0-2,5 as [0, 1, 2, 5]. Raises InputError for anything else, and unless they ascend."""
    parts = text.replace(" ", "").split(",")
    numbers: list[int] = []
    for part in parts:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise InputError(f"--layers: {part!r} is not a layer or a range", "give layers such as 0-14,31")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not numbers or numbers != sorted(set(numbers)):
        raise InputError(f"--layers: {text} does not ascend", "give every layer once, in order, such as 0-14,31")
    return numbers


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _local(model: str, console: Console) -> str:
    """MODEL as a local folder or .gguf file; a hub model is downloaded into the hub's own cache first."""
    from minitron.packages import PACKAGE, package_path

    if model.startswith(PACKAGE):
        return str(package_path(model))
    path = storage.local_path(model)
    if path.exists():
        return str(path)
    if model.startswith((".", "/", "~")) or model.endswith(".gguf"):
        raise InputError(f"{model} does not exist", "give a checkpoint folder, a .gguf file or a hub name")
    console.status(f"downloading {model}")
    return _download(model)


def _download(name: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    from minitron.models import quiet_transformers

    try:
        with quiet_transformers():
            return str(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise InputError(
            f"{name!r} is no local folder or file, and cannot be downloaded from the hub ({_first_line(error)})",
            "check the path or the name, or connect to the network; for a gated model run `hf auth login`",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_scores(scores: ImportanceScores, base: Architecture, file: str) -> None:
    expected = {"heads": (base.num_layers, base.num_heads), "channels": (base.hidden_size,)}
    for name, shape in expected.items():
        actual = tuple(getattr(scores, name).shape)
        if actual != shape:
            raise InputError(
                f"--scores: {file} has {name} {list(actual)} where this model has {list(shape)}",
                "give the scores that were computed for this model",
            )


def _shapes(base: Architecture, target: Architecture) -> Table:
    table = Table()
    for title, side in (("", "left"), ("model", "right"), ("pruned", "right"), ("", "right")):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    rows: list[tuple[str, Any, Any]] = [
        (name.replace("_", " "), before, getattr(target, name)) for name in SIZES if (before := getattr(base, name, 0))
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
