"""Attention as `minitron.attention` chooses it on a GPU, beside the same with a mask of every pair of positions.

    python -m benchmarks.attention [--sequence 8192] [--rounds 7]

One layer's attention of random bfloat16 queries, keys and values, forward and backward, in alternating rounds, and the building
of what it needs for a row, once for all layers of a model. The ratio is of each round's layer. On a CPU, where flex_attention
has no backward pass and is not fused, the forward pass alone at 512 tokens, which shows that it runs and nothing else.
"""

from __future__ import annotations

import argparse
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
LAYERS = 8  # that share a mask
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
    rows = ["", "chosen on a GPU, ms a layer", "with a mask of every pair, ms a layer", "ratio"]
    rows += ["chosen, ms of the mask", "every pair, ms of the mask"]
    if on_gpu():
        rows += ["chosen, peak MB", "every pair, peak MB"]
    print("\n" + "\n".join(markdown(title, rows, columns)))


def _measured(name: str, sequence: int, rounds: int) -> dict[str, str]:
    sides = {kernel: Side(name, sequence, kernel) for kernel in ("flex", "dense")}
    peaks = {}
    layers, masks = ({kernel: list[float]() for kernel in sides} for _ in range(2))
    for kernel, side in sides.items():
        side.attend(side.mask())
        before = memory_now()
        restart_peak()
        side.attend(side.mask())
        peaks[kernel] = peak_memory() - before
    for _ in range(rounds):
        for kernel, side in sides.items():
            start = seconds_now()
            mask = side.mask()
            masks[kernel].append(1e3 * (seconds_now() - start))
            start = seconds_now()
            for _ in range(LAYERS):
                side.attend(mask)
            layers[kernel].append(1e3 * (seconds_now() - start) / LAYERS)
    ratios = [dense / flex for flex, dense in zip(layers["flex"], layers["dense"], strict=True)]
    return {
        "": name,
        "chosen on a GPU, ms a layer": spread(layers["flex"]),
        "with a mask of every pair, ms a layer": spread(layers["dense"]),
        "ratio": spread(ratios),
        "chosen, ms of the mask": spread(masks["flex"]),
        "every pair, ms of the mask": spread(masks["dense"]),
        "chosen, peak MB": f"{peaks['flex'] / 1e6:,.0f}",
        "every pair, peak MB": f"{peaks['dense'] / 1e6:,.0f}",
    }


class Side:
    """One layer's attention with a kernel, and the mask that all layers of a row share."""

    def __init__(self, name: str, sequence: int, kernel: Kernel) -> None:
        changes, apart = CASES[name]
        self.softcap = changes.get("attn_logit_softcapping")
        self.kernel = kernel
        implementation = "eager" if self.softcap else "sdpa"
        self.config = SimpleNamespace(**({"model_type": "llama", "_attn_implementation": implementation} | changes))
        self.tokens = torch.full((1, sequence), END + 1, device=device())
        self.tokens[:, DOCUMENT - 1 :: DOCUMENT] = END
        self.documents = DocumentBoundaries(END) if apart else None
        shapes = [(1, heads, sequence, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        self.states = [
            torch.randn(shape, dtype=torch.bfloat16, device=device(), requires_grad=on_gpu()) for shape in shapes
        ]
        self.layer = torch.nn.Module()
        self.layer.num_key_value_groups = HEADS // KV_HEADS
        self.layer.is_causal = True

    def mask(self) -> Any:
        model = SimpleNamespace(config=self.config, parameters=lambda: iter(self.states))
        return row_arguments(model, self.tokens, self.documents, self.kernel)["attention_mask"]

    def attend(self, mask: Any) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        if self.softcap and self.kernel == "dense":
            attend = eager_attention_forward
        named: dict[str, Any] = {"softcap": self.softcap} if self.softcap else {}
        attended: Tensor = attend(self.layer, *self.states, mask, scaling=HEAD_DIM**-0.5, **named)[0]
        if on_gpu():
            attended.sum().backward()
            for state in self.states:
                state.grad = None


if __name__ == "__main__":
    main()
