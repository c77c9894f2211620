"""What happens to calibration rows without each contiguous block of layers (arXiv 2408.11796 section 3).

The hidden states before every layer are kept from one forward pass, so that removing a block costs only the layers
behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from minitron.families import family_of
from minitron.importance.distributed import add_up, own_batches
from minitron.importance.similarity import cosine_sums
from minitron.logits import CHUNK_TOKENS, Head, cache_slices, tokens_per_chunk
from minitron.models import final_hidden, layers_of

ROW_METRICS = ("loss", "logit_error", "cosine")


def removal_scores(
    model: nn.Module,
    rows: Tensor,
    metric: str,
    kept: Sequence[int],
    sizes: Sequence[int],
    *,
    batch_rows: int,
    advance: Callable[[int], None],
) -> dict[int, Tensor]:
    """{size: float64 [kept - size + 1]}: the metric without the layers that are not in `kept` and, further, the block of
    `size` of the kept ones from each start on.

    rows int64 [num_rows, seq_length], those of all processes; `metric` as in `LayerScoring`. Memory: the residual stream of
    one batch at every depth, and a chunk of logits, twice. `advance` is told rows, once for every position.
    """
    layers = layers_of(model)
    norm = model.get_submodule(family_of(model.config.model_type).final_norm)  # type: ignore[union-attr,arg-type]
    head = Head.of(model)
    device = head.weight.device
    totals = {size: torch.zeros(len(kept) - size + 1, dtype=torch.float64, device=device) for size in sizes}
    scale = torch.zeros((), dtype=torch.float64, device=device)
    untouched = next((place for place, index in enumerate(kept) if place != index), len(kept))
    for batch in own_batches(rows, batch_rows):
        batch = batch.to(device)
        stream, arguments, whole = _record(model, layers, norm, batch)
        stream = stream[: untouched + 1]
        for index in kept[untouched:]:
            stream.append(layers[index](stream[-1], **arguments[index]))
        if metric == "cosine":
            scale += batch.numel()
            cosines = cosine_sums(stream)
        elif metric == "loss":
            scale += batch[:, 1:].numel()
        else:
            scale += sum(part.square().sum(dtype=torch.float64) for part in head.chunks(whole.flatten(0, 1)))
        for size, values in totals.items():
            if metric == "cosine":
                values += batch.numel() - torch.diagonal(cosines, offset=size)
                advance(len(batch) * len(values))
                continue
            for start in range(len(values)):
                hidden = stream[start]
                for index in kept[start + size :]:
                    hidden = layers[index](hidden, **arguments[index])
                hidden = norm(hidden)
                values[start] += _loss_sum(head, hidden, batch) if metric == "loss" else _error_sum(head, hidden, whole)
                advance(len(batch))
    add_up(scale)
    return {size: add_up(values) / scale for size, values in totals.items()}


def _record(
    model: nn.Module, layers: nn.ModuleList, norm: nn.Module, batch: Tensor
) -> tuple[list[Tensor], list[dict[str, Any]], Tensor]:
    """The residual stream before every layer and after the last, every layer's keyword arguments, the final hidden states."""
    stream: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def hook(_: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        stream.append(positional[0] if positional else keywords["hidden_states"])
        arguments.append({name: value for name, value in keywords.items() if name != "hidden_states"})

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in (*layers, norm)]
    try:
        final = final_hidden(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return stream, arguments, final


def _loss_sum(head: Head, hidden: Tensor, batch: Tensor) -> Tensor:
    """Next-token cross-entropy summed over [rows, seq_length] tokens, float64."""
    targets = batch[:, 1:].flatten().split(tokens_per_chunk(head.weight, CHUNK_TOKENS))
    losses = []
    for logits, target in zip(head.chunks(hidden[:, :-1].flatten(0, 1)), targets, strict=True):
        slices = [cross_entropy(logits[rows], target[rows], reduction="none") for rows in cache_slices(logits)]
        losses.append(torch.cat(slices).sum(dtype=torch.float64))
    return torch.stack(losses).sum()


def _error_sum(head: Head, hidden: Tensor, whole: Tensor) -> Tensor:
    """Squared differences of the logits of [rows, seq_length, hidden] from the whole model's, summed, float64."""
    pairs = zip(head.chunks(hidden.flatten(0, 1)), head.chunks(whole.flatten(0, 1)), strict=True)
    return torch.stack([(part - reference).square_().sum(dtype=torch.float64) for part, reference in pairs]).sum()
