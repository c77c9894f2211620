"""Tokenising and packing text by tasks of Ray on one CPU and on two, in turns, with the same rows.

    python -m benchmarks.tokenising [--megabytes 64] [--rounds 3]

The text is the installed packages' documentation, several times, in files of JSON lines; the tokenizer is that of SmolLM2. Each
task has one thread. The wall time is that of everything: reading, tokenising, writing the parts, placing the documents, and
writing the rows. The processor time of placing, which one task does alone, limits how much faster more CPUs can be.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.materials import MODEL
from benchmarks.measure import machine, markdown, spread
from minitron.data import InParts, Rows, TextSource, documents, pack, parts
from minitron.data.part_placing import place_parts
from minitron.models import source_tokenizer
from minitron_platform.cluster.ray_session import ray_session
from minitron_platform.workers.look import no_look
from minitron_platform.workers.parts import run_parts

TOKENS_PER_ROW = 4096
TARGET = 1.7  # 85 % of linear


def timed(job: tuple[Callable[[Any, Any], Any], Any], part: Any) -> tuple[Any, float]:
    """In a worker: the result of a part, and the processor seconds that it took."""
    function, common = job
    started = time.process_time()
    return function(common, part), time.process_time() - started


class Round:
    """Packs by tasks that take `cpus` of the CPUs each, and adds up the processor time."""

    def __init__(self, cpus: int) -> None:
        self.cpus = cpus
        self.shared = self.alone = 0.0

    def run(self, function: Callable[[Any, Any], Any], common: Any, jobs: Iterable[Any]) -> Iterator[Any]:
        options = {"max_failures": 0, "say": print, "look": no_look, "cpus": self.cpus}
        for result, seconds in run_parts(timed, (function, common), jobs, **options):
            if function is place_parts:
                self.alone += seconds
            else:
                self.shared += seconds
            yield result


def write_text(folder: Path, size: int) -> None:
    """Write `size` bytes of documents as JSON lines."""
    texts = islice(documents(TextSource("python-docs")), 800)  # all of them would take a minute
    lines = [json.dumps({"text": document.text}) + "\n" for document in texts]
    written = 0
    with open(folder / "text.jsonl", "w") as file:
        for line in cycle(lines):
            if written >= size:
                return
            written += file.write(line)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tokenising",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--megabytes", type=int, default=64, help="of text")
    parser.add_argument("--part", type=int, default=2, help="megabytes of a part; 32 in a run")
    parser.add_argument("--rounds", type=int, default=3, help="on each number of CPUs")
    given = parser.parse_args()
    parts.PART_BYTES = given.part * 2**20
    tokenizer = source_tokenizer(MODEL)
    walls: dict[int, list[float]] = {1: [], 2: []}
    bounds, tokens_per_second, fingerprints = [], [], set()
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["PYTHONPATH"] = path  # workers import this module
    with tempfile.TemporaryDirectory() as name, ray_session(None, num_cpus=2):
        folder = Path(name)
        write_text(folder, given.megabytes * 10**6)
        source = TextSource("jsonl", str(folder / "text.jsonl"))
        rows = rows_of_text(folder / "text.jsonl", tokenizer)
        sizes = {"seq_length": TOKENS_PER_ROW, "train_rows": rows, "heldout_rows": max(1, rows // 100)}
        warm_up = Round(1)  # starts both workers
        pack(source, tokenizer, f"{name}/warm-up", in_parts=InParts(f"{name}/parts", warm_up.run), **sizes)
        for number in range(given.rounds):
            for workers in (1, 2):
                this = Round(3 - workers)  # a task that takes both CPUs runs alone
                started = time.perf_counter()
                target = f"{name}/{workers}-{number}"
                packed = pack(source, tokenizer, target, in_parts=InParts(f"{name}/parts", this.run), **sizes)
                walls[workers].append(time.perf_counter() - started)
                fingerprints |= {packed.fingerprint, Rows.open(f"{name}/warm-up", "train").fingerprint}
                whole = this.shared + this.alone
                bounds.append(whole / (this.shared / 2 + this.alone))
                tokens_per_second.append(rows * TOKENS_PER_ROW / whole)
    assert len(fingerprints) == 1
    tokens = rows * TOKENS_PER_ROW
    print(f"{machine()}; {tokens:,} tokens of {given.megabytes} MB, parts of {given.part} MB\n")
    columns = [
        {"": f"{workers} CPU{'s' if workers > 1 else ''}", "seconds": spread(walls[workers], 1)}
        | {"tokens/s": f"{tokens / median(walls[workers]):,.0f}"}
        for workers in walls
    ]
    print("\n".join(markdown("Wall time, median (lowest to highest)", ["", "seconds", "tokens/s"], columns)))
    ratios = [one / two for one, two in zip(walls[1], walls[2], strict=True)]
    met = "met" if median(ratios) >= TARGET else "missed"
    print(f"\nTwo CPUs are {spread(ratios)} times as fast as one; target {TARGET}: {met}.")
    print(f"By processor time, with one task that places the documents, at most {spread(bounds)} times.")
    print(f"Tokens per second of processor time: {spread(tokens_per_second, 0)}.")
    sys.exit(met != "met")


def rows_of_text(path: Path, tokenizer: Any) -> int:
    """Number of training rows that nine tenths of the text in a file fill, by a sample."""
    with open(path) as file:
        sample = [json.loads(line)["text"] for line, _ in zip(file, range(200), strict=False)]
    count = sum(len(ids) for ids in tokenizer(sample, verbose=False)["input_ids"])
    size = sum(len(json.dumps({"text": text})) + 1 for text in sample)
    return int(0.9 * path.stat().st_size / size * count) // TOKENS_PER_ROW


if __name__ == "__main__":
    main()
