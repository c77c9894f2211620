"""What Ray adds to a step of a distillation: the same training in a process without Ray, and in a worker of a run.

    python -m benchmarks.ray_tax [--rounds 5] [--steps 8] [--at-most 1.02]

SmolLM2-135M, from stored targets, is distilled into a student of 90M parameters, one process with one thread on each side. Each
round trains on both sides, and the side that begins alternates. While the bare process trains, no Ray runs; the worker sends
the metrics of every step to the driver, as in a run. CPU seconds are those of all threads of the process that trains, which
other processes hardly change: on a machine with few cores Ray's own processes and other work take time from the training too.
Exits with 1 if the median of the rounds' ratios of seconds is above --at-most.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from ray import cloudpickle

from benchmarks.materials import Materials, prepare
from benchmarks.measure import machine, markdown, spread
from minitron.distill import DistillConfig, StepReport, distill
from minitron_platform.cluster.ray_session import ray_session
from minitron_platform.console import Console
from minitron_platform.training.events import Measured
from minitron_platform.workers.group import WorkerGroup
from minitron_platform.workers.worker import Worker

ALONE, WORKER = "in a process without Ray", "in a worker of Ray Train"


@dataclass(frozen=True)
class Training:
    materials: Materials
    batch_rows: int
    steps: int


@dataclass(frozen=True)
class Cost:
    """Cost of a step, the median of a training's steps."""

    seconds: float
    cpu_seconds: float


def train(task: Training, worker: Worker) -> Cost:
    """Train for some steps; returns the cost of one. The first is left out."""
    torch.set_num_threads(1)
    config = DistillConfig(task.steps, batch_rows=task.batch_rows, micro_batch_rows=task.batch_rows, peak_lr=1e-5)
    times: list[tuple[float, float]] = []

    def report(step: StepReport) -> None:
        worker.send(Measured(step.metrics(), step.step))
        times.append((time.perf_counter(), time.process_time()))

    materials = task.materials
    distill(materials.student(torch.bfloat16), materials.stored(), materials.rows(), config, report=report)
    pairs = list(pairwise(times))
    return Cost(*(median(after[clock] - before[clock] for before, after in pairs) for clock in (0, 1)))


def bare(task: Training) -> Cost:
    """Train in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_train_here, task).result()


def _train_here(task: Training) -> Cost:
    return train(task, Worker(0, 1, Console(), _ignore))


def on_ray(task: Training) -> Cost:
    """Train in a worker of Ray Train, on a Ray of its own."""
    with tempfile.TemporaryDirectory() as folder, ray_session("local"):
        group = WorkerGroup(1, {"CPU": 1.0}, threads=1, max_failures=0, scratch=folder)
        cost = group.run(train, task, _ignore)
        group.close()
    return cost


def _ignore(event: object) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ray_tax", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--steps", type=int, default=8, help="of each training")
    parser.add_argument("--rounds", type=int, default=5, help="trainings of each side")
    parser.add_argument("--at-most", type=float, default=1.02, help="the ratio above which the exit code is 1")
    options = parser.parse_args()
    cloudpickle.register_pickle_by_value(sys.modules[Materials.__module__])
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    sides = {bare: list[Cost](), on_ray: list[Cost]()}
    with tempfile.TemporaryDirectory() as folder:
        materials = prepare(Path(folder), shapes="smollm2", seq_length=options.sequence, num_rows=64)
        materials.store()
        task = Training(materials, options.batch, options.steps)
        for number in range(options.rounds):
            for side in list(sides) if number % 2 == 0 else reversed(sides):
                sides[side].append(side(task))
    columns: list[dict[str, str]] = []
    ratios: dict[str, list[float]] = {}
    for clock in ("seconds", "cpu_seconds"):
        alone, worker = ([getattr(cost, clock) for cost in sides[side]] for side in (bare, on_ray))
        ratios[clock] = [theirs / ours for theirs, ours in zip(worker, alone, strict=True)]
        name = clock.replace("cpu_", "CPU ")
        columns.append({"": name, ALONE: spread(alone), WORKER: spread(worker)})
        columns.append({"": f"{name}, this / without Ray", ALONE: "1", WORKER: spread(ratios[clock])})
    title = f"A step of {options.batch} rows of {options.sequence} tokens, {options.rounds} rounds, median (range)"
    print("\n".join([machine(), "", *markdown(title, ["", ALONE, WORKER], columns)]))
    sys.exit(median(ratios["seconds"]) > options.at_most)


if __name__ == "__main__":
    main()
