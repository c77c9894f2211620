"""Metrics on calibration rows without each contiguous block of layers (arXiv 2408.11796 section 3).

The hidden states before every layer are kept from one forward pass, so that removing a block costs only the layers after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minitron.data import DocumentBoundaries
from minitron.families import family_of
from minitron.importance.distributed import own_batches, sum_over_processes
from minitron.importance.similarity import cosine_sums
from minitron.logits import CHUNK_TOKENS, Head, cache_buffer, cache_slices, first_rows, squared_sum_, tokens_per_chunk
from minitron.models import final_hidden, layers_of

ROW_METRICS = ("loss", "logit_error", "cosine")


def removal_scores(
    model: nn.Module,
    rows: Tensor,
    metric: str,
    kept: Sequence[int],
    sizes: Sequence[int],
    *,
    documents: DocumentBoundaries | None,
    batch_rows: int,
    advance: Callable[[int], None],
) -> dict[int, Tensor]:
    """{size: float64 [kept - size + 1]}: the metric of the model that has only the layers in `kept`, without each contiguous
    block of `size` of them.

    rows: int64 [num_rows, seq_length], the same in every process. metric: as in `LayerScoring`. Memory: the residual stream
    of one batch at every depth, and a chunk of logits, twice. `advance` is called with rows, once for every position.
    """
    layers = layers_of(model)
    norm = model.get_submodule(family_of(model.config.model_type).final_norm)  # type: ignore[union-attr,arg-type]
    head = Head.of(model)
    device = head.weight.device
    totals = {size: torch.zeros(len(kept) - size + 1, dtype=torch.float64, device=device) for size in sizes}
    scale = torch.zeros((), dtype=torch.float64, device=device)
    # the layers before the first gap run on the same inputs as in the whole model
    unchanged = next((position for position, index in enumerate(kept) if position != index), len(kept))
    for own, counts in own_batches(rows, batch_rows, model):
        batch = own.to(device)
        weight = float(counts)
        stream, arguments, whole = _record(model, layers, norm, batch, documents)
        stream = stream[: unchanged + 1]
        for index in kept[unchanged:]:
            stream.append(layers[index](stream[-1], **arguments[index]))
        if metric == "cosine":
            scale += weight * batch.numel()
            cosines = cosine_sums(stream)
        elif metric == "loss":
            scale += weight * batch[:, 1:].numel()
        else:
            scale += weight * sum(squared_sum_(part) for part in head.chunks(whole.flatten(0, 1)))
        for size, values in totals.items():
            if metric == "cosine":
                values += weight * (batch.numel() - torch.diagonal(cosines, offset=size))
                if counts:
                    advance(len(batch) * len(values))
                continue
            for start in range(len(values)):
                hidden = stream[start]
                for index in kept[start + size :]:
                    hidden = layers[index](hidden, **arguments[index])
                hidden = norm(hidden)
                change = _loss_sum(head, hidden, batch) if metric == "loss" else _error_sum(head, hidden, whole)
                values[start] += weight * change
                if counts:
                    advance(len(batch))
    sum_over_processes(scale)
    return {size: sum_over_processes(values) / scale for size, values in totals.items()}


def _record(
    model: nn.Module, layers: nn.ModuleList, norm: nn.Module, batch: Tensor, documents: DocumentBoundaries | None
) -> tuple[list[Tensor], list[dict[str, Any]], Tensor]:
    """(residual stream before every layer and after the last, keyword arguments of every layer, final hidden states)."""
    stream: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def hook(_: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        stream.append(positional[0] if positional else keywords["hidden_states"])
        arguments.append({name: value for name, value in keywords.items() if name != "hidden_states"})

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in (*layers, norm)]
    try:
        final = final_hidden(model, batch, documents)
    finally:
        for handle in handles:
            handle.remove()
    return stream, arguments, final


def _loss_sum(head: Head, hidden: Tensor, batch: Tensor) -> Tensor:
    """Next-token cross-entropy summed over the tokens of [rows, seq_length], a float64 scalar."""
    targets = batch[:, 1:].flatten().split(tokens_per_chunk(head.weight, CHUNK_TOKENS))
    losses = []
    buffer = cache_buffer(head.weight)
    for logits, target in zip(head.chunks(hidden[:, :-1].flatten(0, 1)), targets, strict=True):
        slices = []
        for rows in cache_slices(logits):
            log_probs = torch.log_softmax(logits[rows], -1, out=first_rows(buffer, logits[rows]))
            slices.append(-log_probs.gather(1, target[rows, None])[:, 0])
        losses.append(torch.cat(slices).sum(dtype=torch.float64))
    return torch.stack(losses).sum()


def _error_sum(head: Head, hidden: Tensor, whole: Tensor) -> Tensor:
    """Sum of squared differences between the logits of hidden states [rows, seq_length, hidden], a float64 scalar."""
    pairs = zip(head.chunks(hidden.flatten(0, 1)), head.chunks(whole.flatten(0, 1)), strict=True)
    return torch.stack([squared_sum_(part.sub_(reference)) for part, reference in pairs]).sum()
