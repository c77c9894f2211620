"""The requests of a whole run to an object store, counted by an S3 server on this machine, beside the plan's estimate.

    python -m benchmarks.storage_requests [--set KEY=VALUE ...]

The recipe is that of the tests: a small trained teacher, seven candidates of six steps, a distillation of 24 steps, and a
benchmark.
It is run twice; the second run finds everything done.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers import tiny
from helpers.command import command
from helpers.s3_server import s3_server

METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    overrides = [word for override in arguments.overrides for word in ("--set", override)]
    with tempfile.TemporaryDirectory() as name:
        folder = tiny.bench(Path(name))
        log = folder / "requests.log"
        log.touch()
        with s3_server(log) as variables:
            subprocess.run(
                [sys.executable, "-c", "import s3fs; s3fs.S3FileSystem().mkdir('bucket')"],
                env={**os.environ, **variables},
                check=True,
            )
            environment = {**os.environ, **variables, "XDG_CACHE_HOME": str(folder / "cache")}
            options = [
                "--storage",
                "s3://bucket/minitron",
                "--tracking-uri",
                f"sqlite:///{folder}/mlflow.db",
                *overrides,
            ]
            planned = subprocess.run(
                command("plan", "recipe.yaml", *options),
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            print(next(line for line in planned.stdout.splitlines() if line.startswith("storage")))
            print("\n| | requests | " + " | ".join(METHODS) + " |\n|---" + "|---" * (1 + len(METHODS)) + "|")
            for title in ("first run", "second run"):
                _run(title, folder, environment, options, log)


def _run(title: str, folder: Path, environment: dict[str, str], options: list[str], log: Path) -> None:
    """Run the recipe and print a line of the table for every stage that had requests, and one for all."""
    before = _lines(log)
    run = subprocess.Popen(
        command("run", "recipe.yaml", *options), cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    first = len(before)
    for line in run.stdout:
        if line.startswith("✓"):
            lines = _lines(log)
            _print(f"{title}: {line.split()[1]}", lines[first:])
            first = len(lines)
    assert run.wait() == 0
    _print(f"**{title}**", _lines(log)[len(before) :])


def _lines(log: Path) -> list[str]:
    return log.read_text().splitlines()


def _print(title: str, requests: list[str]) -> None:
    counts = Counter(request.split()[0] for request in requests)
    print(
        f"| {title} | {len(requests):,} | " + " | ".join(f"{counts[method]:,}" for method in METHODS) + " |", flush=True
    )


if __name__ == "__main__":
    main()
