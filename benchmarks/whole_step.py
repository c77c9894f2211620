"""The time of whole training steps: this package, and the trainers of TRL and ModelOpt, on the same models and rows.

    python -m benchmarks.whole_step [--only minitron TRL] [--out docs/benchmarks.md]

SmolLM2-135M is distilled into a student of 90M parameters that is pruned from it, on rows of the installed packages'
documentation; with --shapes llama-8b an 8B model into one of 4.5B, with random weights, which needs a GPU. The trainers
are in benchmarks/trainers.py. Each runs in a process of its own, in alternating rounds of a few steps; the time of a step
begins at the end of the step before and so includes reading its data. Set-up, evaluation and saving are excluded, and so is
the single pass of the teacher for stored targets, whose time is printed. On a CPU one thread is used and its processor time
counts. Memory is the peak of resident memory, or of GPU memory, beyond that of the process before it loads a model. Packages
that are not installed are left out: pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.materials import SHAPES, Materials, prepare
from benchmarks.measure import kind_of_seconds, machine, markdown, on_gpu, spread
from benchmarks.trainers import CONTENDERS, OURS, Setup, installed
from benchmarks.workers import OUT_OF_MEMORY, Finished, Turns, Worker
from minitron.distill.report import ASIDE

LARGEST_MICRO_BATCH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.whole_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", choices=SHAPES, default="smollm2")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--micro-batch", type=int, help="rows at a time (default: all of them)")
    parser.add_argument(
        "--recompute", action="store_true", help="gradient checkpointing in all trainers; TRL's default"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile in all trainers")
    parser.add_argument("--rows", type=int, default=32, help="rows of text, which are repeated")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the first round")
    parser.add_argument("--steps", type=int, default=1, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], help="names of trainers, or their beginnings")
    parser.add_argument("--largest-micro-batch", action="store_true", help="GPU: also find it, by doubling")
    parser.add_argument("--out", type=Path, help="also append the table to this file")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--materials", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.micro_batch = options.micro_batch or options.batch
    if options.batch % options.micro_batch:
        parser.error(f"--batch {options.batch} is not a multiple of --micro-batch {options.micro_batch}")
    if (options.shapes != "smollm2" or options.largest_micro_batch) and not on_gpu():
        parser.error("--shapes llama-8b and --largest-micro-batch need a GPU")
    torch.set_num_threads(1)
    if options.contender:
        _train(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        for table in _tables(options, Path(folder)):
            text = "\n".join(table) + "\n"
            print(f"\n{text}", flush=True)
            if options.out:
                with open(options.out, "a") as file:
                    file.write(f"\n{text}")


def _train(options: argparse.Namespace) -> None:
    setup = Setup(
        steps=options.warm_up + options.rounds * options.steps + 1,
        batch_rows=options.batch,
        micro_batch_rows=options.micro_batch,
        recompute=options.recompute,
        compile=options.compile,
    )
    contender = CONTENDERS[options.contender]
    for module in contender.modules:
        import_module(module)
    turns = Turns(options.warm_up, options.steps)
    try:
        contender.run(Materials(options.materials), setup, turns.stepped)
    except Finished:
        return


def _tables(options: argparse.Namespace, folder: Path) -> list[list[str]]:
    names = [name for name in installed() if name.startswith(tuple(options.only))]
    if OURS not in names:
        names.insert(0, OURS)
    materials = prepare(folder, shapes=options.shapes, seq_length=options.sequence, num_rows=options.rows)
    print(f"{machine()}\nthe teacher's targets of {options.rows} rows, once: {materials.store():.0f} s", flush=True)
    tables = [_measure(options, folder, names)]
    if options.largest_micro_batch:
        tables.append(_largest(options, folder, names))
    return tables


def _measure(options: argparse.Namespace, folder: Path, names: list[str]) -> list[str]:
    tokens = options.batch * options.sequence * options.steps
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0)
    lasts: dict[str, dict[str, Any]] = {}
    workers: dict[str, Worker] = {}
    for number in range(options.rounds):
        for name in names:
            worker = workers.pop(name, None) or _worker(options, folder, name)
            answer = worker.turn()
            seconds[name].append(answer["seconds"])
            peaks[name] = max(peaks[name], answer["peak"])
            lasts[name] = answer
            print(
                f"round {number + 1}, {name}: {tokens / answer['seconds']:,.0f} tokens/s", file=sys.stderr, flush=True
            )
            if on_gpu():
                worker.close()  # the next one needs its memory
            else:
                workers[name] = worker
    for worker in workers.values():
        worker.close()
    for name, parts in ((name, last["parts"]) for name, last in lasts.items() if "parts" in last):
        counted = {part: value for part, value in parts.items() if value and part not in ASIDE}
        shares = {part: 100 * value / sum(counted.values()) for part, value in counted.items()}
        print(f"{name}, last step: " + ", ".join(f"{part} {share:.1f} %" for part, share in shares.items()), flush=True)
    ours = [name for name in names if CONTENDERS[name].package == "minitron"]
    columns = [{"": "tokens/s"}, *({"": f"{name} / this"} for name in ours)]
    columns += [{"": "peak memory, GB"}, {"": "loss of the first step"}]
    for name in names:
        ratios = ([value / own for value, own in zip(seconds[name], seconds[one], strict=True)] for one in ours)
        loss = lasts[name]["first_loss"]
        values = [f"{tokens / median(seconds[name]):,.0f}", *map(spread, ratios), f"{peaks[name] / 1e9:.2f}"]
        for column, value in zip(columns, [*values, "-" if loss is None else f"{loss:.3f}"], strict=True):
            column[name] = value
    if on_gpu():
        columns.append({"": "FLOP utilisation"})
        for name in names:
            share = lasts[name].get("utilisation")
            columns[-1][name] = "-" if share is None else f"{100 * share:.1f} %"
    return markdown(
        f"{options.batch} rows of {options.sequence} tokens a step, {options.micro_batch} at a time"
        f"{', gradient checkpointing' if options.recompute else ''}{', compiled' if options.compile else ''}; "
        f"{kind_of_seconds()}; {options.rounds} rounds of {options.steps} in alternation, median (lowest to highest)",
        ["", *names],
        columns,
    )


def _largest(options: argparse.Namespace, folder: Path, names: list[str]) -> list[str]:
    column = {"": "rows at a time"}
    for name in names:
        size, fits = 1, 0
        while size <= LARGEST_MICRO_BATCH:
            again = argparse.Namespace(**vars(options) | {"batch": size, "micro_batch": size})
            try:
                worker = _worker(again, folder, name)
            except RuntimeError as error:
                if OUT_OF_MEMORY not in str(error).lower():
                    raise
                break
            worker.close()
            size, fits = 2 * size, size
        column[name] = str(fits)
    title = f"Largest power of two of rows of {options.sequence} tokens that a step fits in memory"
    return markdown(title, ["", *names], [column])


def _worker(options: argparse.Namespace, folder: Path, name: str) -> Worker:
    command = [sys.executable, "-m", "benchmarks.whole_step", "--contender", name, "--materials", str(folder)]
    for key in ("shapes", "sequence", "batch", "micro_batch", "rows", "warm_up", "steps", "rounds"):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    command += [f"--{key}" for key in ("recompute", "compile") if getattr(options, key)]
    return Worker(command, folder / f"{name.replace(' ', '-')}.log")


if __name__ == "__main__":
    main()
