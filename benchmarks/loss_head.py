"""The loss head against the plain one and those of other packages: gradient error, peak memory and time, in one run.

    python -m benchmarks.loss_head [--out docs/loss-head.md]

Gradients of SmolLM2-135M's own hidden states and head, in bfloat16 on text from the installed packages' documentation,
are compared with float64's, for students at three distances. Memory is measured in a process of its own for each; time in
rounds that take turns. On a CPU one thread works and its processor time counts, which other work disturbs least. Packages
that are not installed are left out: pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.loss_heads import OURS, REFERENCE, Loss, contender, contenders, products
from benchmarks.materials import MODEL
from benchmarks.measure import (
    kind_of_seconds,
    machine,
    markdown,
    memory_now,
    on_gpu,
    peak_memory,
    restart_peak,
    seconds_now,
)
from minitron.data import TextSource, documents
from minitron.device import device
from minitron.logits import Head
from minitron.models import final_hidden, layers_of, load_source

STUDENTS = {"0.4 % noise": (0.004, 0), "2 layers dropped": (0.0, 2), "8 layers dropped": (0.0, 8)}
TIMED = "2 layers dropped"
FLOORS = {"products alone, float32 logits": True, "products alone, bfloat16 logits": False}
NOISE_SEED, WARM_UP_TOKENS = 0, 256
GPU_SHAPE = (8192, 3072, 4096, 128_256)  # tokens, widths of student and teacher, vocabulary: Llama-3.1-8B to 4.5B


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss_head", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exact-tokens", type=int, default=512, help="tokens of the comparison with float64")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each timed call")
    parser.add_argument("--memory-tokens", type=int, default=4096, help="tokens of the call whose memory is measured")
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
    students = _students(max(options.exact_tokens, options.tokens, options.memory_tokens))
    yield _errors(losses, students, options.exact_tokens)
    material = students[TIMED]
    if on_gpu():
        tokens, *shape = GPU_SHAPE
        material, options.tokens, options.memory_tokens = _random(tokens, *shape), tokens, tokens
    yield _memory(losses, material, options.memory_tokens)
    yield _times(losses, _first(material, options.tokens), options.rounds)


def _students(tokens: int) -> dict[str, dict[str, Tensor]]:
    """For each student, hidden states [tokens, d] and heads [V, d] of it and its teacher, bfloat16 on the device."""
    model, tokenizer = load_source(MODEL)
    ids: list[int] = []
    for document in documents(TextSource("python-docs")):
        if len(ids) >= tokens:
            break
        ids += tokenizer(document.text)["input_ids"]
    rows = torch.tensor(ids[:tokens]).view(-1, min(tokens, 256)).to(device())
    original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    layers = layers_of(model)
    every, config = list(layers), model.config
    model.to(device(), torch.bfloat16).eval()

    def hidden() -> Tensor:
        with torch.no_grad():
            return torch.cat([final_hidden(model, part) for part in rows.split(2)]).flatten(0, 1)

    ht, wt = hidden(), Head.of(model).weight.detach().clone()
    found = {}
    for name, (noise, dropped) in STUDENTS.items():
        draw = torch.Generator().manual_seed(NOISE_SEED)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                value = original[key]
                parameter.copy_(value + noise * value.std() * torch.randn(value.shape, generator=draw))
        start = len(every) // 2 - dropped // 2
        del layers[start : start + dropped]
        config.num_hidden_layers = len(layers)
        found[name] = {"hs": hidden(), "ws": Head.of(model).weight.detach().clone(), "ht": ht, "wt": wt}
        del layers[:]
        layers.extend(every)
    return found


def _random(tokens: int, student: int, teacher: int, vocabulary: int) -> dict[str, Tensor]:
    def draw(rows: int, columns: int, scale: float) -> Tensor:
        return torch.randn(rows, columns, device=device()).mul_(scale).bfloat16()

    return {
        "hs": draw(tokens, student, 1.0),
        "ws": draw(vocabulary, student, 0.02),
        "ht": draw(tokens, teacher, 1.0),
        "wt": draw(vocabulary, teacher, 0.02),
    }


def _first(material: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    return {name: tensor[:tokens] if name in ("hs", "ht") else tensor for name, tensor in material.items()}


def _gradients(loss: Loss, material: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    hs, ws = (material[name].detach().requires_grad_(True) for name in ("hs", "ws"))
    loss(hs, ws, material["ht"], material["wt"]).backward()
    assert hs.grad is not None
    assert ws.grad is not None
    return hs.grad, ws.grad


def _errors(losses: dict[str, Loss], students: dict[str, dict[str, Tensor]], tokens: int) -> list[str]:
    """Relative error |g - g64| / |g64| of the gradients of hidden states and head, in percent."""
    columns = []
    for name, student in students.items():
        material = _first(student, tokens)
        kl, *exact = _exact(material)
        column = {"": f"{name}, KL {kl:.2g}"}
        for loss, function in losses.items():
            errors = [
                100 * ((got.double() - wanted).norm() / wanted.norm()).item()
                for got, wanted in zip(_gradients(function, material), exact, strict=True)
            ]
            column[loss] = " / ".join(f"{error:.2g}" for error in errors)
        columns.append(column)
    return markdown(
        f"Error of the gradients of hidden states / head against float64, percent; {tokens} tokens",
        ["", *losses],
        columns,
    )


def _exact(material: dict[str, Tensor]) -> tuple[float, Tensor, Tensor]:
    """KL and its gradients by the closed form in float64."""
    hs, ws, ht, wt = (material[name].double() for name in ("hs", "ws", "ht", "wt"))
    teacher, student = (ht @ wt.T).log_softmax(-1), (hs @ ws.T).log_softmax(-1)
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean().item()
    slope = (student.exp() - teacher.exp()) / len(hs)
    return kl, slope @ ws, slope.T @ hs


def _memory(losses: dict[str, Loss], material: dict[str, Tensor], tokens: int) -> list[str]:
    column = {"": "peak, MB"}
    ratio = {"": "dense / this"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "material.safetensors"
        save_file(_first(material, tokens), str(file))
        command = [sys.executable, "-m", "benchmarks.loss_head", "--material", str(file), "--memory-of"]
        peaks = {}
        for name in losses:
            done = subprocess.run([*command, name], check=True, capture_output=True, text=True)
            peaks[name] = int(done.stdout.splitlines()[-1])
    for name, peak in peaks.items():
        column[name] = f"{peak / 1e6:,.0f}"
        ratio[name] = f"{peaks[REFERENCE] / peak:.1f}"
    vocabulary = len(material["ws"])
    return markdown(
        f"Memory beyond the operands, with both gradients; {tokens:,} tokens, vocabulary {vocabulary:,}",
        ["", *losses],
        [column, ratio],
    )


def _peak(loss: Loss, material: dict[str, Tensor]) -> int:
    """Bytes that one forward and backward needs beyond what is there, after a small one for what is made once."""
    _gradients(loss, _first(material, WARM_UP_TOKENS))
    restart_peak()
    before = memory_now()
    _gradients(loss, material)
    return peak_memory() - before


def _times(losses: dict[str, Loss], material: dict[str, Tensor], rounds: int) -> list[str]:
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
    columns: list[dict[str, str]] = [{"": "median, s"}, {"": f"this / {OURS}"}, {"": "lowest to highest"}]
    for name, values in seconds.items():
        ratios = [value / own for value, own in zip(values, seconds[OURS], strict=True)]
        columns[0][name] = f"{median(values):.3g}"
        columns[1][name] = f"{median(ratios):.2f}"
        columns[2][name] = f"{min(ratios):.2f} to {max(ratios):.2f}"
    tokens, vocabulary = len(material["hs"]), len(material["ws"])
    return markdown(
        f"Forward and backward, {kind_of_seconds()}; {tokens:,} tokens, vocabulary {vocabulary:,}, {rounds} rounds in turns",
        ["", *works],
        columns,
    )


def _seconds(work: Callable[[], object]) -> float:
    started = seconds_now()
    work()
    return seconds_now() - started


if __name__ == "__main__":
    main()
