"""Attention as `minitron.attention` chooses it on a GPU, beside the same with a mask of every pair of positions.

    python -m benchmarks.attention [--sequence 8192] [--rounds 7]

One layer's attention of random bfloat16 queries, keys and values, forward and backward, in alternating rounds; the building
of masks is timed too. The ratio is of each round. On a CPU, where flex_attention has no backward pass and is not fused,
the forward pass alone at 512 tokens, which shows that it runs and nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import machine, markdown, memory_now, on_gpu, peak_memory, restart_peak, seconds_now, spread
from minitron.attention import Kernel, row_arguments
from minitron.data import DocumentBoundaries
from minitron.device import device

HEADS, KV_HEADS, HEAD_DIM, WINDOW, DOCUMENT, SOFTCAP = 32, 8, 128, 1024, 700, 50.0
END = 1
# (what is seen, changes of the config, whether the documents of a row are kept apart)
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "all before": ({}, False),
    f"a window of {WINDOW:,}": ({"sliding_window": WINDOW}, False),
    f"documents of {DOCUMENT}": ({}, True),
    "all before, soft-capped": ({"model_type": "gemma2", "attn_logit_softcapping": SOFTCAP}, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequence", type=int, default=8192 if on_gpu() else 512)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(machine())
    columns = [_measured(name, options.sequence, options.rounds) for name in CASES]
    passes = "forward and backward" if on_gpu() else "forward alone"
    title = f"Attention of a row of {options.sequence:,} tokens, {HEADS} and {KV_HEADS} heads of {HEAD_DIM}, {passes}"
    rows = ["", "chosen on a GPU, ms", "with a mask of every pair, ms", "ratio"]
    if on_gpu():
        rows += ["chosen, peak MB", "with a mask, peak MB"]
    print("\n" + "\n".join(markdown(title, rows, columns)))


def _measured(name: str, sequence: int, rounds: int) -> dict[str, str]:
    sides = {kernel: _pass(name, sequence, kernel) for kernel in ("flex", "dense")}
    peaks, times = {}, {kernel: list[float]() for kernel in sides}
    for kernel, run in sides.items():
        run()
        before = memory_now()
        restart_peak()
        run()
        peaks[kernel] = peak_memory() - before
    for _ in range(rounds):
        for kernel, run in sides.items():
            start = seconds_now()
            run()
            times[kernel].append(1e3 * (seconds_now() - start))
    ratios = [dense / flex for flex, dense in zip(times["flex"], times["dense"], strict=True)]
    return {
        "": name,
        "chosen on a GPU, ms": spread(times["flex"]),
        "with a mask of every pair, ms": spread(times["dense"]),
        "ratio": spread(ratios),
        "chosen, peak MB": f"{peaks['flex'] / 1e6:,.0f}",
        "with a mask, peak MB": f"{peaks['dense'] / 1e6:,.0f}",
    }


def _pass(name: str, sequence: int, kernel: Kernel) -> Callable[[], None]:
    """A function that builds the masks and runs the attention of one layer."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    changes, apart = CASES[name]
    eager = "attn_logit_softcapping" in changes
    config = SimpleNamespace(
        **({"model_type": "llama", "_attn_implementation": "eager" if eager else "sdpa"} | changes)
    )
    tokens = torch.full((1, sequence), END + 1, device=device())
    tokens[:, DOCUMENT - 1 :: DOCUMENT] = END
    documents = DocumentBoundaries(END) if apart else None
    shapes = [(1, heads, sequence, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    states = [torch.randn(shape, dtype=torch.bfloat16, device=device(), requires_grad=on_gpu()) for shape in shapes]
    model = SimpleNamespace(config=config, parameters=lambda: iter(states))
    layer = torch.nn.Module()
    layer.num_key_value_groups = HEADS // KV_HEADS
    layer.is_causal = True
    softcap = changes.get("attn_logit_softcapping")

    def run() -> None:
        mask = row_arguments(model, tokens, documents, kernel)["attention_mask"]
        attend = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
        if eager and kernel == "dense":
            attend = eager_attention_forward
        named: dict[str, Any] = {"softcap": softcap} if softcap else {}
        attended: Tensor = attend(layer, *states, mask, scaling=HEAD_DIM**-0.5, **named)[0]
        if on_gpu():
            attended.sum().backward()
            for state in states:
                state.grad = None

    return run


if __name__ == "__main__":
    main()
