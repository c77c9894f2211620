"""How early the order of a search's candidates is known, and the cost of the search: python -m benchmarks.search

SmolLM2-135M is pruned to about 90M parameters in four searches: some of the candidates with the stored teacher, the same with
the teacher run by every trial, all candidates to the end, and all candidates with forward-only scores and successive halving.
The third search shows how well each earlier measure predicts the order.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.materials import MODEL
from benchmarks.measure import machine
from benchmarks.search.work import LONG, SHORT, Size, prepare
from minitron.data import TextSource
from minitron_platform.cluster.ray_session import ray_session
from minitron_search import Pool, search
from minitron_search.halving import Halving
from minitron_search.results import SearchResult


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--short", action="store_true", help="for two CPU cores (the default)")
    form.add_argument("--long", action="store_true", help="for one H200; give --text")
    parser.add_argument("--model", default=MODEL, help="a folder, .gguf file or hub name (default: %(default)s)")
    parser.add_argument("--text", metavar="PATH", help="parquet or jsonl with a column `text` (default: docstrings)")
    parser.add_argument("--candidates", type=int, help="number of candidates (default: 24, with --long 48)")
    parser.add_argument("--out", type=Path, help="also append the tables to this file")
    options = parser.parse_args()
    if options.long and not options.text:
        parser.error("--long needs --text: the docstrings of installed packages are too few")
    size = LONG if options.long else SHORT
    size = replace(size, candidates=options.candidates) if options.candidates else size
    with tempfile.TemporaryDirectory(prefix="minitron-search-") as folder:
        text = _report(Path(folder), size, options)
    print(text)
    if options.out:
        with open(options.out, "a") as file:
            file.write(text)


def _report(folder: Path, size: Size, options: argparse.Namespace) -> str:
    study = prepare(folder, size, options.model, _text(options.text))
    say(f"{len(study.candidates)} candidates; storing the targets took {study.storing:.0f} s")
    few = study.candidates[:: max(1, len(study.candidates) // size.compared)][: size.compared]
    gpu = torch.cuda.is_available()
    pool = Pool(str(folder / "tune"), share={"CPU": 1, "GPU": 0.25} if gpu else {"CPU": 1})
    with ray_session(None, num_cpus=None):
        stored, stored_seconds = _timed(study.task(size, folder / "stored"), few, pool)
        online, online_seconds = _timed(study.task(size, folder / "online", online=True), few, pool)
        full, full_seconds = _timed(study.task(size, folder / "full"), study.candidates, pool)
        early: dict[str, Any] = {"forward_keep": len(study.candidates) // 2, "halving": Halving(keep=0.5, grace=0.5)}
        short, short_seconds = _timed(study.task(size, folder / "early"), study.candidates, pool, **early)
    return "\n".join(
        [
            f"\n{machine()}; {size.steps} steps of {size.batch_rows} rows of {size.seq_length} tokens per candidate,",
            f"measured on {size.heldout_rows} held-out rows.\n",
            *_order(full),
            *_early(full, short, full_seconds, short_seconds),
            *_store(stored, online, stored_seconds + study.storing, online_seconds, study.storing),
        ]
    )


def _timed(task: Any, architectures: list[Any], pool: Pool, **options: Any) -> tuple[SearchResult, float]:
    started = time.perf_counter()
    result = search(task, architectures, pool=pool, **options)
    seconds = time.perf_counter() - started
    say(f"{Path(task.folder).name}: {len(architectures)} candidates in {seconds:.0f} s; {result.reason}")
    return result, seconds


def _order(full: SearchResult) -> list[str]:
    """How well each earlier measure predicts the order after the whole short distillation."""
    rows = [
        f"| {row.measure} | {math.nan if row.tau is None else row.tau:.2f} | {row.regret:.3f} | {row.regret_kept:.3f} | "
        f"{row.saved:.0%} |"
        for row in full.stability
    ]
    ranking = full.ranking
    best, worst = ranking[0].kl, ranking[-1].kl
    return [
        f"How well each earlier measure predicts the final order of {len(ranking)} candidates "
        f"(held-out KL {best:.3f} to {worst:.3f}; "
        f"{sum(candidate.tied for candidate in ranking)} tied with the best):\n",
        "| order by | Kendall's tau | its best is worse by | the best of its first half is worse by | steps saved |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


def _early(full: SearchResult, short: SearchResult, full_seconds: float, short_seconds: float) -> list[str]:
    """The time that forward-only scores and halving save, and the final KL that they cost."""
    final = {candidate.architecture: candidate for candidate in full.ranking}
    lowest = full.ranking[0].kl
    regret = final[short.winner].kl - lowest
    return [
        "Distilling all candidates to the end, and half of them by KL undistilled with halving from half of the steps on:\n",
        "| | all to the end | early |",
        "|---|---|---|",
        f"| seconds | {full_seconds:.0f} | {short_seconds:.0f} |",
        f"| all / this | 1.00 | {full_seconds / short_seconds:.2f} |",
        f"| winner | {full.winner} | {short.winner} |",
        f"| the winner's final KL is above the lowest by | {final[full.winner].kl - lowest:.3f} | {regret:.3f} |",
        f"\nThe early winner is number {final[short.winner].rank} of {len(final)}.\n",
    ]


def _store(stored: SearchResult, online: SearchResult, with_store: float, without: float, storing: float) -> list[str]:
    """The time that the stored teacher saves, and how much the results of both searches differ."""
    a, b = ({candidate.architecture: candidate for candidate in result.ranking} for result in (stored, online))
    ratios = sorted(b[architecture].seconds / a[architecture].seconds for architecture in a)
    apart = max(abs(a[architecture].kl - b[architecture].kl) for architecture in a)
    return [
        f"{len(a)} candidates with the teacher's hidden states stored and with the teacher run by every trial:\n",
        "| | stored | run by every trial |",
        "|---|---|---|",
        f"| seconds, storing included ({storing:.0f}) | {with_store:.0f} | {without:.0f} |",
        f"| this / stored | 1.00 | {without / with_store:.2f} |",
        f"| of one trial, median (lowest to highest) | 1.00 | {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |",
        f"\nThe same candidate's KL differs by at most {apart:.1e} between the two.\n",
    ]


def _text(path: str | None) -> TextSource:
    if path is None:
        return TextSource("python-docs")
    return TextSource("jsonl" if ".jsonl" in path else "parquet", path=path)


_started = time.monotonic()


def say(line: str) -> None:
    print(f"{time.monotonic() - _started:6.0f} s  {line}", flush=True)


if __name__ == "__main__":
    main()
