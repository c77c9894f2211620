"""The time that training waits for checkpoints, written in the background or in the foreground, and for data.

    python -m benchmarks.stalls [--folder /data/somewhere] [--out docs/benchmarks.md]

SmolLM2-135M, from stored targets, is distilled into a student of 90M parameters by the training loop. After some steps the
whole state (float32 weights and both moments) is saved and the loop waits for it; after some more steps it is saved while
training continues; and so on in alternation. The stall of the first kind is the whole write, that of the second the time until
`save` returns; the slowdown of the steps during the write is given as well. All times are wall time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.materials import prepare
from benchmarks.measure import machine, markdown, spread
from benchmarks.workers import Finished
from minitron.distill import DistillConfig, StepReport, distill
from minitron.distill.checkpoints import Checkpoints
from minitron.distill.report import ASIDE
from minitron.distill.state import TrainingState

UNDISTURBED_STEPS = 2  # between a checkpoint in the foreground and one in the background
MOST_STEPS = 10_000


class Stalls:
    """Called after every step: saves alternately in both ways, and times saves and steps; raises Finished after `rounds`."""

    def __init__(self, checkpoints: Checkpoints, tensors: dict[str, Tensor], rounds: int) -> None:
        self.checkpoints, self.tensors, self.rounds = checkpoints, tensors, rounds
        self.waited: list[float] = []
        self.returned: list[float] = []
        self.undisturbed: list[float] = []
        self.lost: list[float] = []
        """Seconds more than undisturbed that the steps beside the writing took, for each checkpoint."""
        self.beside: list[float] = []
        self.reports: list[StepReport] = []
        self.quiet = 0
        self.before = 0.0

    def __call__(self, report: StepReport) -> None:
        seconds = time.perf_counter() - self.before
        if report.step == 1:
            self._wait(report.step)  # a first save, to warm up
            self.waited.clear()
        else:
            self.reports.append(report)
            self._next(report.step, seconds)
        self.before = time.perf_counter()

    def _next(self, step: int, seconds: float) -> None:
        if self.quiet < UNDISTURBED_STEPS:
            self.undisturbed.append(seconds)
            self.quiet += 1
            if self.quiet == UNDISTURBED_STEPS:
                self.returned.append(self._save(step))
            return
        self.beside.append(seconds)
        pending = self.checkpoints.pending
        if pending is not None and not pending.done():
            return
        self.lost.append(sum(self.beside) - len(self.beside) * median(self.undisturbed))
        self.beside, self.quiet = [], 0
        self._wait(step)
        if len(self.waited) == self.rounds:
            raise Finished

    def _save(self, step: int) -> float:
        started = time.perf_counter()
        self.checkpoints.save(step, self.tensors, {})
        return time.perf_counter() - started

    def _wait(self, step: int) -> None:
        started = time.perf_counter()
        self.checkpoints.save(step, self.tensors, {})
        self.checkpoints.wait()
        self.waited.append(time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stalls", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--rows", type=int, default=128, help="rows of text; targets are stored in shards of 64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="folder for all files (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, help="also append the tables to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        text = _measure(options, Path(folder))
    print(f"{machine()}\n\n{text}", flush=True)
    if options.out:
        with open(options.out, "a") as file:
            file.write(f"\n{text}")


def _measure(options: argparse.Namespace, folder: Path) -> str:
    materials = prepare(folder, shapes="smollm2", seq_length=options.sequence, num_rows=options.rows)
    materials.store()
    config = DistillConfig(MOST_STEPS, batch_rows=options.batch, micro_batch_rows=options.batch, peak_lr=1e-5)
    student = materials.student(torch.bfloat16)
    # tensors of the size and kind of the training loop's state, which is private to the loop
    state = TrainingState(list(student.named_parameters()), config).tensors()
    with Checkpoints(str(folder / "checkpoints"), key="benchmark") as checkpoints:
        stalls = Stalls(checkpoints, state, options.rounds)
        with suppress(Finished):
            distill(student, materials.stored(), materials.rows(), config, report=stalls)
    size = sum(tensor.nbytes for tensor in state.values())
    tables = _checkpoints(stalls, size), _data(stalls.reports, options)
    return "\n".join(line for table in tables for line in [*table, ""])


def _checkpoints(stalls: Stalls, size: int) -> list[str]:
    ratios = [returned / waited for returned, waited in zip(stalls.returned, stalls.waited, strict=True)]
    whole = [
        (returned + lost) / waited
        for returned, lost, waited in zip(stalls.returned, stalls.lost, stalls.waited, strict=True)
    ]
    rows = {
        "waited for": (spread(stalls.waited), "1"),
        "in the background: until it returns": (spread(stalls.returned), spread(ratios)),
        "in the background: and what steps lose meanwhile": (
            spread([a + b for a, b in zip(stalls.returned, stalls.lost, strict=True)]),
            spread(whole),
        ),
    }
    columns: list[dict[str, str]] = [{"": "seconds"}, {"": "this / waited for"}]
    for name, values in rows.items():
        for column, value in zip(columns, values, strict=True):
            column[name] = value
    title = (
        f"Stall of a checkpoint of {size / 1e9:.2f} GB, wall time, {len(stalls.waited)} in alternation, median (lowest to "
        f"highest); an undisturbed step takes {spread(stalls.undisturbed)} s"
    )
    return markdown(title, ["", *rows], columns)


def _data(reports: list[StepReport], options: argparse.Namespace) -> list[str]:
    shares = []
    for report in reports:
        parts = {name: seconds for name, seconds in report.seconds.items() if name not in ASIDE}
        shares.append({name: 100 * seconds / sum(parts.values()) for name, seconds in parts.items()})
    column = {"": "percent of a step"}
    for key, name in (("data", "rows"), ("teacher", "stored targets")):
        column[name] = spread([share[key] for share in shares], digits=3)
    column["both"] = spread([share["data"] + share["teacher"] for share in shares], digits=3)
    title = (
        f"Wait for data, {options.batch} rows of {options.sequence} tokens a step, {len(reports)} steps, median (lowest to "
        "highest)"
    )
    return markdown(title, list(column), [column])


if __name__ == "__main__":
    main()
