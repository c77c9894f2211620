"""Documents per second of an evaluation, and the share of that time in which the GPU works.

    python -m benchmarks.evaluation_speed --data benchmarks/ [--model MODEL] [--limit 2000]

Each task is measured once, after a few of its documents have loaded what is needed, with batches as `evaluate.batch_rows: auto`
has them. The folder has one folder for each task. The time that kernels take is summed in a second run of fewer documents,
under PyTorch's profiler.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.materials import MODEL
from benchmarks.measure import machine, markdown, on_gpu, peak_memory, restart_peak
from minitron.device import device
from minitron.evaluation import Task, evaluate_documents
from minitron.models import load_source

TASKS = {"hellaswag": 0, "arc_challenge": 0, "winogrande": 0, "hellaswag, 10-shot": 10, "winogrande, 5-shot": 5}
WARM_UP, PROFILED = 16, 256


def measure(model: Any, tokenizer: Any, name: str, data: Path, limit: int) -> dict[str, str]:
    """A column of the table."""

    def evaluated(limit: int) -> tuple[int, float]:
        """Documents, and seconds."""
        known = name.split(",")[0]
        task = Task(known, str(data / known), limit=limit, num_fewshot=TASKS[name])
        started = time.perf_counter()
        result = evaluate_documents(model, tokenizer, [task], batch_size="auto")[known]
        return result.score.num_documents, time.perf_counter() - started

    evaluated(WARM_UP)
    restart_peak()
    documents, seconds = evaluated(limit)
    column = {"": name, "documents": f"{documents:,}", "seconds": f"{seconds:.1f}"}
    column |= {"documents/s": f"{documents / seconds:,.0f}", "peak memory, GB": f"{peak_memory() / 1e9:.2f}"}
    if on_gpu():
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            _, seconds = evaluated(PROFILED)
        busy = sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6
        column["GPU works, percent"] = f"{100 * busy / seconds:.0f}"
    return column


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--limit", type=int, default=2000, help="documents of each task")
    given = parser.parse_args()
    model, tokenizer = load_source(given.model, dtype=torch.bfloat16)
    model = model.to(device()).eval()
    columns = [measure(model, tokenizer, name, given.data, given.limit) for name in given.tasks]
    rows = ["", "documents", "seconds", "documents/s", *(["GPU works, percent"] if on_gpu() else []), "peak memory, GB"]
    print("\n".join(markdown(f"{machine()}; {given.model}", rows, columns)))


if __name__ == "__main__":
    main()
