"""What a tiny run on this machine spends on starting things: wall time, of which some passes while stages compute.

    python -m benchmarks.starts [--rounds 3]

The recipe is that of the tests, up to the evaluation: a small trained teacher, two workers, trials on a private Ray.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil

HERE = Path(__file__).resolve()
WAITS = ("imports", "waiting for Ray", "first call of the workers", "first trial", "whole run")


class Waits:
    """Seconds that the command waited, by what for; the first time counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.begun: dict[str, float] = {}

    def begin(self, name: str) -> None:
        self.begun.setdefault(name, time.perf_counter())

    def end(self, name: str) -> None:
        if name in self.begun:
            self.seconds.setdefault(name, time.perf_counter() - self.begun[name])


def before(owner: Any, method: str, call: Callable[[Any], None]) -> None:
    """Call `call(argument)` with the last argument of a method before each call of it."""
    original = getattr(owner, method)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        call(arguments[-1])
        return original(*arguments, **options)

    setattr(owner, method, wrapped)


def run_recipe(folder: str) -> None:
    """In a process of its own: run the recipe, and print the seconds as JSON."""
    from minitron_platform import load_recipe, run
    from minitron_platform.stages import ray_start
    from minitron_platform.stages.trial_records import TrialsView
    from minitron_platform.workers.group import WorkerGroup
    from minitron_platform.workers.worker import WorkerStarted
    from minitron_platform.workers.workers import Workers
    from minitron_search.events import Started
    from minitron_search.pool import Pool

    waits = Waits()
    imported = time.time() - psutil.Process().create_time()
    wait = ray_start._PrivateRay.wait

    def timed_wait(self: Any) -> None:
        waits.begin("waiting for Ray")
        wait(self)
        waits.end("waiting for Ray")

    ray_start._PrivateRay.wait = timed_wait  # type: ignore[method-assign]
    handler = Workers._handler

    def watched(self: Any, on_event: Any) -> Any:
        handle = handler(self, on_event)

        def seen(event: Any) -> None:
            if isinstance(event, WorkerStarted):
                waits.end("first call of the workers")
            handle(event)

        return seen

    Workers._handler = watched  # type: ignore[method-assign]
    before(WorkerGroup, "run", lambda _: waits.begin("first call of the workers"))
    before(Pool, "open", lambda _: waits.begin("first trial"))
    before(TrialsView, "event", lambda event: waits.end("first trial") if isinstance(event, Started) else None)
    run(load_recipe(f"{folder}/recipe.yaml"), storage_path=f"{folder}/runs-{time.time_ns()}", until="evaluate")
    whole = time.time() - psutil.Process().create_time()
    print(json.dumps(waits.seconds | {"imports": imported, "whole run": whole}))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.starts", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    sys.path.insert(0, str(HERE.parents[1] / "tests"))
    from helpers import tiny

    with tempfile.TemporaryDirectory() as name:
        folder = tiny.bench(Path(name))
        rounds = []
        for _ in range(given.rounds):
            program = f"from benchmarks.starts import run_recipe; run_recipe({str(folder)!r})"
            done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
    print("| | seconds, median (lowest to highest) |\n|---|---|")
    for name in WAITS:
        seconds = [each.get(name, 0.0) for each in rounds]
        print(f"| {name} | {median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) |")


if __name__ == "__main__":
    main()
