"""Peaks of main memory, each of a process of its own, beside their estimates."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence

from minitron.memory import MainMemory


def compare_peaks(module: str, description: str | None, cases: Sequence[str], one: Callable[[str], MainMemory]) -> None:
    """The command line of a benchmark: a line for each case with the peak of resident memory, and the estimate with its parts.

    module: the benchmark's name. one: carries out a case and returns the estimate.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(cases), metavar="NAME", help="default: all")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        estimate = one(arguments.one)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"peak": peak, "total": estimate.total, "parts": vars(estimate)}), flush=True)
        return
    width = max(map(len, cases)) + 2
    print(f"{'case':<{width}}{'peak, GB':>10}{'estimate, GB':>14}{'estimate / peak':>17}", flush=True)
    for name in arguments.cases:
        command = [sys.executable, "-m", module, "--one", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        measured = json.loads(done.stdout.splitlines()[-1])
        peak, total = measured["peak"], measured["total"]
        parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in measured["parts"].items())
        print(f"{name:<{width}}{peak / 1e9:>10.2f}{total / 1e9:>14.2f}{total / peak:>17.2f}  {parts}", flush=True)
