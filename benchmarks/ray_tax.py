"""What Ray adds to a step of a distillation: the same training in this process alone, and in a worker of the run's group.

    python -m benchmarks.ray_tax [--rounds 5] [--steps 8]

SmolLM2-135M, from stored targets, is distilled into a student of 90M parameters, one process with one thread on each side, in
turns. The worker sends the metrics of every step to the driver, as in a run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Training:
    materials: Materials
    batch_rows: int
    steps: int


def train(task: Training, worker: Worker) -> list[float]:
    """Train for some steps; returns the seconds of each but the first."""
    torch.set_num_threads(1)
    config = DistillConfig(task.steps, batch_rows=task.batch_rows, micro_batch_rows=task.batch_rows, peak_lr=1e-5)
    times = [0.0]

    def report(step: StepReport) -> None:
        worker.send(Measured(step.metrics(), step.step))
        times.append(time.perf_counter())

    materials = task.materials
    distill(materials.student(torch.bfloat16), materials.stored(), materials.rows(), config, report=report)
    return [after - before for before, after in zip(times[1:], times[2:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ray_tax", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--steps", type=int, default=8, help="of each training")
    parser.add_argument("--rounds", type=int, default=5, help="trainings of each side")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ray_session("local"):
        materials = prepare(Path(folder), shapes="smollm2", seq_length=options.sequence, num_rows=64)
        materials.store()
        task = Training(materials, options.batch, options.steps)
        cloudpickle.register_pickle_by_value(sys.modules[Materials.__module__])
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        group = WorkerGroup(1, {"CPU": 1.0}, threads=1, max_failures=0, scratch=str(Path(folder, "ray")))
        alone = Worker(0, 1, Console(), lambda event: None)
        bare: list[float] = []
        on_ray: list[float] = []
        for _ in range(options.rounds):
            bare.append(median(train(task, alone)))
            on_ray.append(median(group.run(train, task, lambda event: None)))
        group.close()
    ratios = [theirs / ours for theirs, ours in zip(on_ray, bare, strict=True)]
    rows = {"alone": (spread(bare), "1"), "in a worker of Ray Train": (spread(on_ray), spread(ratios))}
    columns: list[dict[str, str]] = [{"": "seconds"}, {"": "this / alone"}]
    for name, values in rows.items():
        for column, value in zip(columns, values, strict=True):
            column[name] = value
    title = f"A step of {options.batch} rows of {options.sequence} tokens, {options.rounds} trainings in turns, median (range)"
    print("\n".join([machine(), "", *markdown(title, ["", *rows], columns)]))


if __name__ == "__main__":
    main()
