"""The time of whole training steps: this package, and the trainers of TRL and ModelOpt, on the same models and rows.

    python -m benchmarks.whole_step [--shapes llama-3b] [--only minitron TRL] [--out docs/benchmarks.md]

"smollm2": SmolLM2-135M is distilled into a student of 90M parameters that is pruned from it. "llama-135m", "llama-3b",
"llama-8b" and "llama-70b" need a GPU and have random weights: 135M into 89M, 3.2B into 2.0B, 8B into 4.5B, and 70B into 35B
with as many layers as fit. "tiny" only tries the command. Rows are the documentation of installed packages. The trainers are in
benchmarks/trainers.py.

Each trainer runs in a process of its own, and so does the preparation. On a CPU they take turns of a few steps. On a GPU each
ends before the next one begins, so that each has all the memory. There they train with the fastest settings that fit: those
of this package by its own estimate, the others by trying; what runs out of memory with all of them is a row that says so.
The time of a step begins at the end of the step before and so includes reading its data. Set-up, evaluation and saving are
excluded, and so is the single pass of the teacher for stored targets, whose time is printed. On a CPU one thread is used and
its processor time counts. Memory is the peak of resident memory, or of GPU memory, beyond that of the process before it loads
a model. Packages that are not installed are left out: pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.materials import SHAPES, SMOLLM2, Materials, prepare
from benchmarks.measure import machine, on_gpu
from benchmarks.shapes import CUT, RANDOM, most_layers, pair
from benchmarks.step_comparison import Comparison, command, tries_of
from benchmarks.step_results import About
from benchmarks.trainers import CONTENDERS, OURS, Setup, installed
from benchmarks.workers import Finished, Turns
from minitron.device import datasheet_flops, gpu_bytes, matmul_flops
from minitron.distill import DistillConfig
from minitron.distill.blocks import ACTIVATION_CHECKPOINTING
from minitron.distill.config import OPTIMIZERS
from minitron.distill.fp8 import FP8

ABOUT = "about.json"
ON_CPUS = (SMOLLM2, "tiny")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.whole_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", choices=SHAPES, default=SMOLLM2)
    parser.add_argument("--layers", type=int, default=0, help="of random models (default: all, or as many as fit)")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--micro-batch", type=int, help="rows at a time (default: what fits; all of them on a CPU)")
    parser.add_argument(
        "--recompute",
        nargs="?",
        const="full",
        choices=ACTIVATION_CHECKPOINTING,
        help="gradient checkpointing in all trainers (default: what fits; none on a CPU); TRL's default is full",
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="of minitron (default: what fits; adamw on a CPU)")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="all",
        choices=("all", "minitron"),
        help="torch.compile in all trainers, or in ours alone",
    )
    parser.add_argument(
        "--fp8", choices=FP8, default="none", help="products of minitron's linear layers, with --compile"
    )
    parser.add_argument("--cuda-graphs", action="store_true", help="in minitron's trainings: for small models")
    parser.add_argument("--rows", type=int, default=32, help="rows of text, which are repeated")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the first round")
    parser.add_argument("--steps", type=int, default=1, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], help="names of trainers, or their beginnings")
    parser.add_argument("--largest-micro-batch", action="store_true", help="GPU: also find it, by doubling")
    parser.add_argument("--plan", type=float, metavar="GB", help="only print the settings to try on such a GPU")
    parser.add_argument("--out", type=Path, help="also append the table to this file")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--materials", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.micro_batch and options.batch % options.micro_batch:
        parser.error(f"--batch {options.batch} is not a multiple of --micro-batch {options.micro_batch}")
    if options.plan is not None:
        if options.shapes == SMOLLM2:
            parser.error(f"--plan needs --shapes with random weights: {', '.join(RANDOM)}")
        print("\n".join(_plan(options, int(options.plan * 1e9))))
        return
    if (options.shapes not in ON_CPUS or options.largest_micro_batch) and not on_gpu():
        parser.error(f"--shapes other than {' and '.join(ON_CPUS)}, and --largest-micro-batch, need a GPU")
    torch.set_num_threads(1)
    if options.prepare:
        _prepare(options)
    elif options.contender:
        _train(options)
    else:
        _compare(options)


def _layers(options: argparse.Namespace, size: int) -> int:
    """Layers of the random models on a GPU of `size` bytes; 0 for all."""
    if options.layers or options.shapes not in CUT or not size:
        return int(options.layers)
    config = DistillConfig(1, batch_rows=options.batch)
    return most_layers(options.shapes, config, options.sequence, size)


def _plan(options: argparse.Namespace, size: int) -> list[str]:
    teacher, student = pair(options.shapes, _layers(options, size))
    billions = [f"{shape.num_parameters / 1e9:.2f}B" for shape in (teacher, student)]
    lines = [f"{options.shapes}: {' -> '.join(billions)}, {teacher.num_layers} layers"]
    for name in (name for name in CONTENDERS if name.startswith(tuple(options.only))):
        for number, settings in enumerate(tries_of(name, options, teacher, student, size)):
            estimate = f", estimate {settings.estimate / 1e9:.1f} GB" if settings.estimate else ""
            lines.append(f"{name}: {'else ' if number else ''}{settings}{estimate}")
    return lines


def _prepare(options: argparse.Namespace) -> None:
    """In a process of its own, because what a process has had on a GPU is not all given back before it ends."""
    layers = _layers(options, gpu_bytes())
    materials = prepare(
        options.materials, shapes=options.shapes, seq_length=options.sequence, num_rows=options.rows, layers=layers
    )
    about = About(
        machine=machine(),
        gpu_bytes=gpu_bytes(),
        measured_flops=matmul_flops(torch.bfloat16),
        datasheet_flops=datasheet_flops(torch.bfloat16),
        store_seconds=materials.store(),
    )
    (options.materials / ABOUT).write_text(json.dumps(asdict(about)))


def _train(options: argparse.Namespace) -> None:
    setup = Setup(
        steps=options.warm_up + options.rounds * options.steps + 1,
        batch_rows=options.batch,
        micro_batch_rows=options.micro_batch,
        recompute=options.recompute,
        optimizer=options.optimizer,
        compile=bool(options.compile),
        fp8=options.fp8,
        cuda_graphs=options.cuda_graphs,
    )
    contender = CONTENDERS[options.contender]
    for module in contender.modules:
        import_module(module)
    turns = Turns(options.warm_up, options.steps)
    try:
        contender.run(Materials(options.materials), setup, turns.stepped)
    except Finished:
        return


def _compare(options: argparse.Namespace) -> None:
    names = [name for name in installed() if name.startswith(tuple(options.only))]
    if OURS not in names:
        names.insert(0, OURS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        given = {"materials": folder, "shapes": options.shapes, "layers": options.layers}
        given |= {"sequence": options.sequence, "batch": options.batch, "rows": options.rows}
        subprocess.run([*command(**given), "--prepare"], check=True)
        about = About(**json.loads((folder / ABOUT).read_text()))
        print(
            f"{about.machine}\nthe teacher's targets of {options.rows} rows, once: {about.store_seconds:.0f} s",
            flush=True,
        )
        comparison = Comparison(options, folder, about, names)
        comparison.measure()
        tables = [comparison.table()]
        if options.largest_micro_batch:
            tables.append(comparison.largest())
    for table in tables:
        text = "\n".join(table) + "\n"
        print(f"\n{text}", flush=True)
        if options.out:
            with open(options.out, "a") as file:
                file.write(f"\n{text}")
    if comparison.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
