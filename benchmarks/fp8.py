"""Distillations in bfloat16 and with FP8 products, by their KL to the teacher on other rows.

    python -m benchmarks.fp8 [--steps 16] [--seeds 2] [--compile]

SmolLM2-135M is the teacher and runs on every batch, with FP8 products as the student has; the student of 90M parameters was
pruned from it. Both are measured in bfloat16. A CPU emulates FP8 products, so its times say nothing. Needs minitron[fp8].
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.materials import SMOLLM2, Materials, prepare
from benchmarks.measure import machine, on_gpu, seconds_now
from minitron.device import device
from minitron.distill import DistillConfig, LiveTeacher, distill
from minitron.distill.fp8 import FP8
from minitron.evaluation import heldout_metrics
from minitron.logits import Head
from minitron.models import final_hidden

SEQ_LENGTH, BATCH_ROWS, TRAIN_ROWS, HELDOUT_ROWS = 256, 2, 96, 16


class Part:
    """The first `count` rows of a folder of rows."""

    def __init__(self, rows: object, count: int) -> None:
        self.rows, self.count = rows, count
        self.seq_length = SEQ_LENGTH

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Sequence[int]) -> torch.Tensor:
        return self.rows.take(indices)  # type: ignore[attr-defined,no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        materials = prepare(Path(folder), shapes=SMOLLM2, seq_length=SEQ_LENGTH, num_rows=TRAIN_ROWS + HELDOUT_ROWS)
        print(
            f"{machine()}; {options.steps} steps of {BATCH_ROWS} rows of {SEQ_LENGTH} tokens, {options.seeds} seeds\n"
        )
        print("| FP8 | KL before | KL after, by seed | differs from bfloat16 |" + (" ms a step |" if on_gpu() else ""))
        print("|---|---|---|---|" + ("---|" if on_gpu() else ""))
        plain: list[float] = []
        for scaling in FP8:
            before, results, seconds = measure(materials, scaling, options)
            plain = plain or results
            change = statistics.mean(mine / other - 1 for mine, other in zip(results, plain, strict=True))
            cells = [scaling, f"{before:.4f}", " ".join(f"{kl:.4f}" for kl in results), f"{change:+.2%}"]
            print("| " + " | ".join(cells + ([f"{1000 * seconds:.0f}"] if on_gpu() else [])) + " |", flush=True)


def measure(materials: Materials, scaling: str, options: argparse.Namespace) -> tuple[float, list[float], float]:
    """KL on the held-out rows before and, for each seed, after the distillation; seconds of a step."""
    teacher = materials.teacher()
    rows = materials.rows()
    heldout = rows.take(range(TRAIN_ROWS, TRAIN_ROWS + HELDOUT_ROWS))

    def kl(model: torch.nn.Module) -> float:
        metrics = heldout_metrics(
            model,
            heldout,
            teacher_hidden=lambda part: final_hidden(teacher, heldout[part].to(device())),
            teacher_head=Head.of(teacher),
        )
        assert metrics.kl is not None
        return metrics.kl

    before, results, seconds = 0.0, [], 0.0
    for seed in range(options.seeds):
        student = materials.student(torch.bfloat16)
        before = kl(student)
        config = DistillConfig(
            steps=options.steps,
            batch_rows=BATCH_ROWS,
            peak_lr=3e-4,
            warmup_steps=2,
            seed=seed,
            fp8=scaling,
            compile=options.compile,
        )
        started = seconds_now()
        distill(student, LiveTeacher(teacher), Part(rows, TRAIN_ROWS), config)  # type: ignore[arg-type]
        seconds = (seconds_now() - started) / options.steps
        results.append(kl(student))
    return before, results, seconds


if __name__ == "__main__":
    main()
