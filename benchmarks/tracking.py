"""How fast the records of a run get into MLflow: metric points per second, from the spool to a server or database.

    python -m benchmarks.tracking --tracking-uri http://127.0.0.1:5000
    python -m benchmarks.tracking --tracking-uri postgresql+psycopg://user@127.0.0.1/mlflow

Each of `--runs` runs has the curve of a training with five metrics. Then the points in MLflow are counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time

from minitron_platform.tracking.flusher import Flusher, create_database, prepare_mlflow
from minitron_platform.tracking.spool import Spool

METRICS = ("train_loss", "train_kl", "learning_rate", "grad_norm", "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tracking-uri", required=True)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    prepare_mlflow(arguments.tracking_uri)
    create_database(arguments.tracking_uri)
    experiment = f"benchmark-{time.time_ns()}"
    steps = arguments.points // len(METRICS) // arguments.runs
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(f"{folder}/runs/benchmark/spool")
        began = time.perf_counter()
        for index in range(arguments.runs):
            record = spool.record(f"benchmark.{index}")
            record.start(f"run {index}")
            for step in range(1, steps + 1):
                record.metrics({name: step + position / 10 for position, name in enumerate(METRICS)}, step)
            record.end()
        spool.flush()
        recorded = time.perf_counter() - began
        flusher = Flusher(spool, arguments.tracking_uri, experiment)
        began = time.perf_counter()
        unsent = flusher.close()
        sent = time.perf_counter() - began
        runs = flusher.run_ids()
        spool.close()
    points = steps * len(METRICS) * arguments.runs
    print(f"{points:,} points in {arguments.runs} runs, {unsent} records unsent")
    print(
        f"recorded in {recorded:.1f} s: {recorded / (steps * arguments.runs) * 1e6:.0f} µs for a step of {len(METRICS)}"
    )
    print(f"sent in {sent:.1f} s: {points / sent:,.0f} points/s")
    stored = _count(arguments.tracking_uri, list(runs.values()))
    print(f"{stored:,} points in MLflow")
    if stored != points or unsent:
        raise SystemExit("points are missing, or there are too many")


def _count(tracking_uri: str, runs: list[str]) -> int:
    """Number of metric points of some MLflow runs."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    return sum(len(client.get_metric_history(run, name)) for run in runs for name in METRICS)


if __name__ == "__main__":
    main()
