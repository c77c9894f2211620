"""Loss without each contiguous block of layers (arXiv 2408.11796 section 3: contiguous blocks, ranked by their effect).

The hidden states before every layer are kept from one forward pass, so that removing a block costs only the layers
behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minitron.architecture import Architecture
from minitron.logits import Head
from minitron.models import final_hidden, head_of, layers_of


def block_losses(
    model: nn.Module,
    rows: Tensor,
    sizes: Sequence[int],
    *,
    batch_rows: int = 4,
    advance: Callable[[int], None] | None = None,
) -> dict[int, Tensor]:
    """{size: float32 [layers - size + 1]}, nats per token with the block from each start on removed.

    rows int64 [num_rows, seq_length]. Memory: the residual stream of one batch at every depth.
    """
    layers = layers_of(model)
    table = Architecture.from_config(model.config).table
    norm, head = model.get_submodule(table.final_norm), Head(head_of(model))
    totals = {size: torch.zeros(len(layers) - size + 1, dtype=torch.float64) for size in sizes}
    for batch in rows.split(batch_rows) if sizes else ():
        batch = batch.to(head.weight.device)
        calls = _record(model, layers, batch)
        for size, losses in totals.items():
            for start in range(len(losses)):
                hidden = calls[start][0]
                for index in range(start + size, len(layers)):
                    hidden = layers[index](hidden, **calls[index][1])
                losses[start] += _loss_sum(norm(hidden), head, batch)
                if advance:
                    advance(len(batch))
    tokens = len(rows) * (rows.shape[1] - 1)
    return {size: (losses / tokens).float() for size, losses in totals.items()}


def _record(model: nn.Module, layers: nn.ModuleList, batch: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
    """Every layer's input and keyword arguments in one forward pass."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        rest = {name: value for name, value in keywords.items() if name != "hidden_states"}
        calls.append((arguments[0] if arguments else keywords["hidden_states"], rest))

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        final_hidden(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _loss_sum(hidden: Tensor, head: Head, batch: Tensor) -> float:
    """Summed next-token cross-entropy, one row at a time so that the logits stay small."""
    total = 0.0
    for states, tokens in zip(hidden, batch, strict=True):
        total += float(nn.functional.cross_entropy(head.logits(states[:-1]), tokens[1:], reduction="sum"))
    return total
