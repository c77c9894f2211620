"""The logit loss compared with a plain one and those of other packages: gradient error, peak memory and time.

    python -m benchmarks.loss_head [--out docs/loss-head.md]

Gradients of SmolLM2-135M's own hidden states and head, in bfloat16 on text from the installed packages' documentation,
are compared with those in float64, for students at three distances. Memory is measured in a process of its own for each
loss, time in alternating rounds. On a CPU one thread is used and its processor time counts, which other work disturbs least.
With --shapes hidden states and heads are random, with the sizes of "llama-3b" (3.2B into 2.0B), "llama-8b" (8B into 4.5B; on a
GPU the default), "llama-70b" (70B into 35B) or "tiny", which only tries the command. Packages that are not installed are left
out: pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.loss_heads import OURS, REFERENCE, Loss, contender, contenders, products, products_flops
from benchmarks.loss_material import NOISES, Material, noisy_pair, random_pair, text_students
from benchmarks.measure import (
    kind_of_seconds,
    machine,
    markdown,
    memory_now,
    on_gpu,
    peak_memory,
    restart_peak,
    seconds_now,
    spread,
)
from benchmarks.shapes import RANDOM
from minitron.device import device

TEXT, TIMED = "text", "2 layers dropped"
FLOORS = {"products alone, float32 logits": True, "products alone, bfloat16 logits": False}
WARM_UP_TOKENS = 256
SMALLEST_PEAK = 10**6  # what a small call needs may fit in memory that the process already has


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss_head", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        choices=(TEXT, *RANDOM),
        default=TEXT if not on_gpu() else "llama-8b",
        help="sizes of hidden states and heads",
    )
    parser.add_argument("--exact-tokens", type=int, help="tokens of the comparison with float64")
    parser.add_argument("--tokens", type=int, help="tokens of each timed call")
    parser.add_argument(
        "--memory-tokens", type=int, default=4096, help="tokens of the call whose memory is measured, on a CPU"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also append the tables to this file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--material", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        material = {name: tensor.to(device()) for name, tensor in load_file(str(options.material)).items()}
        print(json.dumps(_peak(contender(options.memory_of), material)))
        return
    for table in _tables(options):
        text = "\n".join(table) + "\n"
        print(f"\n{text}", flush=True)
        if options.out:
            with open(options.out, "a") as file:
                file.write(f"\n{text}")


def _tables(options: argparse.Namespace) -> Iterator[list[str]]:
    print(machine())
    losses = contenders()
    if options.shapes != TEXT:
        exact_tokens = options.exact_tokens or 1024
        pairs = ((f"{noise:.0%} noise", noisy_pair(options.shapes, exact_tokens, noise)) for noise in NOISES)
        yield _errors(losses, pairs)
        material = random_pair(options.shapes, options.tokens or 8192)
        yield (_memory_here if on_gpu() else _memory)(losses, material)
        yield _times(losses, material, options.rounds)
        return
    exact_tokens, tokens = options.exact_tokens or 512, options.tokens or 1024
    students = text_students(max(exact_tokens, tokens, options.memory_tokens))
    yield _errors(losses, ((name, _first(student, exact_tokens)) for name, student in students.items()))
    yield _memory(losses, _first(students[TIMED], options.memory_tokens))
    yield _times(losses, _first(students[TIMED], tokens), options.rounds)


def _first(material: Material, tokens: int) -> Material:
    return {name: tensor[:tokens] if name in ("hs", "ht") else tensor for name, tensor in material.items()}


def _gradients(loss: Loss, material: Material) -> tuple[Tensor, Tensor]:
    hs, ws = (material[name].detach().requires_grad_(True) for name in ("hs", "ws"))
    loss(hs, ws, material["ht"], material["wt"]).backward()
    assert hs.grad is not None
    assert ws.grad is not None
    return hs.grad, ws.grad


def _errors(losses: dict[str, Loss], students: Iterable[tuple[str, Material]]) -> list[str]:
    """Relative error |g - g64| / |g64| of the gradients of hidden states and head, in percent."""
    columns = []
    for name, material in students:
        tokens = len(material["hs"])
        kl, *exact = _exact(material)
        column = {"": f"{name}, KL {kl:.2g}"}
        for loss, function in losses.items():
            errors = [
                100 * ((actual.double() - expected).norm() / expected.norm()).item()
                for actual, expected in zip(_gradients(function, material), exact, strict=True)
            ]
            column[loss] = " / ".join(f"{error:.2g}" for error in errors)
        columns.append(column)
    return markdown(
        f"Error of the gradients of hidden states / head against float64, percent; {tokens} tokens",
        ["", *losses],
        columns,
    )


def _exact(material: Material) -> tuple[float, Tensor, Tensor]:
    """KL and its gradients in float64, from their closed form."""
    hs, ws, ht, wt = (material[name].double() for name in ("hs", "ws", "ht", "wt"))
    teacher, student = (ht @ wt.T).log_softmax(-1), (hs @ ws.T).log_softmax(-1)
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean().item()
    slope = (student.exp() - teacher.exp()) / len(hs)
    return kl, slope @ ws, slope.T @ hs


def _memory(losses: dict[str, Loss], material: Material) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "material.safetensors"
        save_file(material, str(file))
        command = [sys.executable, "-m", "benchmarks.loss_head", "--material", str(file), "--memory-of"]
        peaks = {}
        for name in losses:
            done = subprocess.run([*command, name], check=True, capture_output=True, text=True)
            peaks[name] = int(done.stdout.splitlines()[-1])
    return memory_table(peaks, material)


def _memory_here(losses: dict[str, Loss], material: Material) -> list[str]:
    """Like `_memory`, in this process, because the allocator of a GPU counts exactly."""
    peaks = {}
    for name, loss in losses.items():
        torch.cuda.empty_cache()
        peaks[name] = _peak(loss, material)
    return memory_table(peaks, material)


def memory_table(peaks: dict[str, int], material: Material) -> list[str]:
    """Lines of the table of peaks in bytes; a peak below `SMALLEST_PEAK` is given as a bound, without a ratio."""
    column, ratio = {"": "peak, MB"}, {"": "dense / this"}
    for name, peak in peaks.items():
        measured = peak >= SMALLEST_PEAK
        column[name] = f"{peak / 1e6:,.0f}" if measured else f"< {SMALLEST_PEAK / 1e6:,.0f}"
        ratio[name] = f"{peaks[REFERENCE] / peak:.1f}" if measured else "-"
    return markdown(
        f"Memory beyond the operands, with both gradients; {_size(material)}", ["", *peaks], [column, ratio]
    )


def _peak(loss: Loss, material: Material) -> int:
    """Bytes that a forward and backward pass needs beyond its operands, after a small pass for one-time allocations."""
    _gradients(loss, _first(material, WARM_UP_TOKENS))
    restart_peak()
    before = memory_now()
    _gradients(loss, material)
    return peak_memory() - before


def _times(losses: dict[str, Loss], material: Material, rounds: int) -> list[str]:
    works: dict[str, Callable[[], object]] = {
        name: partial(_gradients, loss, material) for name, loss in losses.items()
    }
    works |= {name: partial(products, **material, exact=exact) for name, exact in FLOORS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            taken = _seconds(work)
            if turn:  # the first compiles and warms up
                seconds[name].append(taken)
    flops = products_flops(**material)
    columns: list[dict[str, str]] = [{"": "ms"}, {"": "TF/s"}, {"": f"this / {OURS}"}, {"": "lowest to highest"}]
    for name, values in seconds.items():
        ratios = [value / own for value, own in zip(values, seconds[OURS], strict=True)]
        columns[0][name] = spread([1e3 * value for value in values], 1)
        columns[1][name] = f"{flops / median(values) / 1e12:.3g}"
        columns[2][name] = f"{median(ratios):.2f}"
        columns[3][name] = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return markdown(
        f"Forward and backward, {kind_of_seconds()}; {_size(material)}, {rounds} alternating rounds",
        ["", *works],
        columns,
    )


def _size(material: Material) -> str:
    widths = [material[name].shape[1] for name in ("ht", "hs")]
    return f"{len(material['hs']):,} tokens, vocabulary {len(material['ws']):,}, widths {widths[0]:,} and {widths[1]:,}"


def _seconds(work: Callable[[], object]) -> float:
    started = seconds_now()
    work()
    return seconds_now() - started


if __name__ == "__main__":
    main()
