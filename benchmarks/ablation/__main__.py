"""python -m benchmarks.ablation: makes the table of docs/ablations.md."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.ablation.plan import ARMS, LONG, SHORT, Study
from benchmarks.ablation.table import markdown
from benchmarks.ablation.work import prepare, result_path, run_arm
from benchmarks.materials import MODEL
from minitron.device import processor


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation",
        description="Compare the method's choices; killed and run again, it goes on.",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--short", action="store_true", help="about an hour on two CPU cores (the default)")
    form.add_argument("--long", action="store_true", help="39 million tokens a student, for one H200; give --text")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/ablation"),
        help="for models and results",
    )
    parser.add_argument(
        "--model",
        default=MODEL,
        help="a folder, .gguf file or hub name (default: SmolLM2-135M-Instruct from the installed package)",
    )
    parser.add_argument(
        "--text", metavar="PATH", help="parquet or jsonl with a column `text` (default: installed packages' docstrings)"
    )
    parser.add_argument("--seeds", type=int, help="number of seeds for each student (default: 3)")
    arguments = parser.parse_args()

    if arguments.long and not arguments.text:
        parser.error("--long needs --text: the docstrings of installed packages are too few")
    size = LONG if arguments.long else SHORT
    size = replace(size, seeds=arguments.seeds) if arguments.seeds else size
    study = Study(size, arguments.model, _text(arguments.text))
    folder = arguments.folder / ("long" if arguments.long else "short")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)

    prepare(folder, study, say)
    todo = [(name, seed) for seed in range(size.seeds) for name in ARMS]
    waiting = [(name, seed) for name, seed in todo if not result_path(folder, ARMS[name], seed).exists()]
    say(f"{len(todo) - len(waiting)} of {len(todo)} students are done already")
    with ProcessPoolExecutor(size.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(run_arm, folder, study, *item): item for item in waiting}
        for done, future in enumerate(as_completed(pending), start=1):
            result, (name, seed) = future.result(), pending[future]
            losses = f"loss {result['before']['loss']:.3f} to {result['after']['loss']:.3f}"
            say(f"{done}/{len(waiting)}  {name}, seed {seed}: {losses}")
    command = "python -m benchmarks.ablation " + ("--long" if arguments.long else "--short")
    command += "".join(f" --{key} {value}" for key, value in _changed_options(arguments).items())
    text = markdown(folder, study, _hardware(size.workers), command)
    (folder / "table.md").write_text(text)
    print(f"\n{text}\n{folder / 'table.md'}")


def _changed_options(arguments: argparse.Namespace) -> dict[str, object]:
    """Command-line options that change the figures, besides --short and --long."""
    given = {"model": arguments.model, "text": arguments.text, "seeds": arguments.seeds}
    return {key: value for key, value in given.items() if value not in (None, MODEL)}


def _text(path: str | None) -> dict[str, str]:
    if path is None:
        return {"kind": "python-docs"}
    return {"kind": "jsonl" if ".jsonl" in path else "parquet", "path": path}


def _hardware(workers: int) -> str:
    return processor() if torch.cuda.is_available() else f"{workers} cores of {processor()}"


if __name__ == "__main__":
    main()
