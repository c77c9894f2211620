"""`minitron throughput`: how fast models generate text, in turns."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from minitron.errors import InputError
from minitron_platform.cli.model_sources import (
    ENGINES,
    MODEL_HELP,
    SERVER_HELP,
    check_models,
    checkpoint,
    dtype_option,
    load,
)
from minitron_platform.cli.options import check_out, tracking_options
from minitron_platform.console import Console

if TYPE_CHECKING:
    from minitron.throughput import Engine, Workload
    from minitron_platform.locations import Locations

NVIDIA = "128/128,128/2048,2048/128,2048/2048"  # of the first tables that NVIDIA published for TensorRT-LLM


@click.command(epilog=f"{MODEL_HELP} {SERVER_HELP}")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--shapes",
    metavar="IN/OUT,...",
    default="128/128",
    show_default=True,
    help=f"Tokens of prompt and answer; nvidia for {NVIDIA}.",
)
@click.option("--batch", metavar="N,...", default="1", show_default=True, help="Requests at a time.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Batches of each model.")
@click.option("--out", metavar="FILE.json", help="Write all figures to this file.")
@click.option(
    "--engine",
    "kinds",
    type=click.Choice(ENGINES),
    multiple=True,
    default=[ENGINES[0]],
    show_default=True,
    help="What loads the models; several in turns. vllm: the command on the PATH.",
)
@dtype_option
@tracking_options
def throughput(
    locations: Locations,
    models: tuple[str, ...],
    shapes: str,
    batch: str,
    rounds: int,
    kinds: tuple[str, ...],
    out: str | None,
    dtype: str,
) -> None:
    """Measure how fast models generate text.

    Requests and tokens per second, time to first token, time between tokens, and memory, for each length of prompt and answer
    and each batch. The models take turns, batch by batch; ratios are to the first one, round by round.

    \b
    minitron throughput ./teacher ./student --shapes 128/128,2048/128 --batch 1,32
    minitron throughput ./teacher ./student --engine vllm --shapes nvidia --batch 64 --out speed.json
    minitron throughput http://127.0.0.1:8000/v1#teacher http://127.0.0.1:8001/v1#student --batch 8
    """
    from minitron import storage
    from minitron.device import compute_dtype, device_name
    from minitron.throughput import measure
    from minitron.throughput.result_file import results_json
    from minitron_platform.cli.throughput_table import model_numbers, notes, throughput_table

    workloads = _workloads(shapes, batch)
    if len(set(kinds)) < len(kinds):
        raise InputError("--engine: one is given twice", "give each once")
    check_out(out)
    check_models(models, locations)
    torch_dtype = str(compute_dtype(dtype)).removeprefix("torch.")
    console = Console()
    with ExitStack() as opened, console.working("throughput"):
        console.status("loading")
        engines = _engines(opened, models, workloads, locations, kinds, torch_dtype)
        console.status("warming up")
        results = measure(engines, workloads, rounds=rounds, progress=console.counter("rounds"))
    for (model, kind), number in model_numbers(results).items():
        console.say(f"{number}  {escape(model)} ({kind})")
    console.table(throughput_table(results, device_name(), torch_dtype))
    for line in notes(results):
        console.say(f"[yellow]{escape(line)}[/]")
    if out:
        storage.write_json(out, results_json(results, device=device_name(), dtype=torch_dtype))
        console.say(f"written to [bold]{escape(out)}[/]")
    if any(result.failure for result in results):
        raise SystemExit(1)


def _workloads(shapes: str, batch: str) -> list[Workload]:
    from minitron.throughput import Workload

    lengths = [
        _numbers(f"--shapes {each!r}", each, "/") for each in (NVIDIA if shapes == "nvidia" else shapes).split(",")
    ]
    if any(len(each) != 2 for each in lengths):
        raise InputError(
            f"--shapes {shapes}: not pairs of lengths", "write INPUT/OUTPUT, with commas between: 128/128,2048/128"
        )
    return [
        Workload(prompt, answer, rows)
        for prompt, answer in lengths
        for rows in _numbers(f"--batch {batch!r}", batch, ",")
    ]


def _numbers(what: str, text: str, separator: str) -> list[int]:
    parts = [part.strip() for part in text.split(separator)]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"{what}: not numbers with {separator} between", "give numbers of 1 or more")
    return [int(part) for part in parts]


def _engines(
    opened: ExitStack,
    models: tuple[str, ...],
    workloads: list[Workload],
    locations: Locations,
    kinds: tuple[str, ...],
    dtype: str,
) -> list[tuple[str, Engine]]:
    """The models and their engines; what they hold is released with `opened`."""
    from minitron.completions import Served, is_served
    from minitron.throughput import InMemoryEngine, ServerEngine, vllm_server
    from minitron.throughput.vllm import check_servable

    own = [model for model in models if not is_served(model)]
    longest = max(each.input_tokens + each.output_tokens for each in workloads)
    concurrent = max(each.batch for each in workloads)
    share = 1 / max(1, len(own) * len(kinds))
    engines: list[tuple[str, Engine]] = []
    for model in models:
        if is_served(model):
            engines.append((model, ServerEngine(Served.parse(model))))
            continue
        source = opened.enter_context(checkpoint(model, locations))
        for kind in kinds:
            if kind == "transformers":
                engines.append((model, InMemoryEngine(load(source, dtype).model)))
                continue
            check_servable(source)
            server = vllm_server(source, dtype=dtype, longest=longest, concurrent=concurrent, share=share)
            engines.append((model, opened.enter_context(server)))
    return engines
