"""Importance of every unit from one forward-only pass over calibration rows (arXiv 2407.14679 section 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minitron.architecture import Architecture
from minitron.errors import InputError
from minitron.importance.aggregate import AGGREGATIONS, OverBatch, over_sequence
from minitron.importance.blocks import block_losses
from minitron.importance.scores import ImportanceScores
from minitron.models import final_hidden, layers_of

Progress = Callable[[int, int], None]


def estimate_importance(
    model: nn.Module,
    rows: Tensor,
    *,
    batch_aggregation: str = "l2",
    sequence_aggregation: str = "mean",
    block_sizes: Sequence[int] = (),
    block_rows: int | None = None,
    batch_rows: int = 4,
    progress: Progress | None = None,
) -> ImportanceScores:
    """Score heads, neurons, embedding channels and layers.

    model: a transformers causal language model of a supported family. rows: int64 [num_rows, seq_length], packed tokens.
    Heads are scored at the output projection's input by their L2 norm over head_dim, neurons after the activation,
    channels after every norm (summed over the norms), layers by the cosine of the residual stream before and after.
    `block_sizes` also measures the loss without each contiguous block of those sizes, on the first `block_rows` rows.
    Raises InputError for an unknown aggregation or family.
    """
    for key, how in (("batch_aggregation", batch_aggregation), ("sequence_aggregation", sequence_aggregation)):
        if how not in AGGREGATIONS:
            raise InputError(f"{key}: {how!r} is not an aggregation", f"use one of {', '.join(AGGREGATIONS)}")
    was_training = model.training
    model.eval()
    block_input = rows[: block_rows or len(rows)]
    positions = {size: int(model.config.num_hidden_layers) - size + 1 for size in block_sizes}  # type: ignore[union-attr,arg-type]
    total = len(rows) + sum(positions.values()) * len(block_input)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    collector = _Collector(model, batch_aggregation, sequence_aggregation)
    try:
        with torch.inference_mode():
            for batch in rows.split(batch_rows):
                collector.forward(batch.to(next(model.parameters()).device))
                advance(len(batch))
            losses = block_losses(model, block_input, tuple(block_sizes), batch_rows=batch_rows, advance=advance)
    finally:
        collector.remove()
        model.train(was_training)
    return ImportanceScores(
        heads=torch.stack([scores.result() for scores in collector.heads]),
        neurons=torch.stack([scores.result() for scores in collector.neurons]),
        channels=torch.stack([scores.result() for scores in collector.channels]).sum(dim=0),
        similarity=(collector.similarity / len(rows)).float().cpu(),
        block_loss=losses,
        provenance={
            "rows": len(rows),
            "seq_length": rows.shape[1],
            "block_rows": len(block_input) if block_sizes else 0,
            "batch_aggregation": batch_aggregation,
            "sequence_aggregation": sequence_aggregation,
        },
    )


class _Collector:
    """Forward hooks on one model, and what they gathered."""

    def __init__(self, model: nn.Module, batch: str, sequence: str) -> None:
        config = model.config
        self.architecture = Architecture.from_config(config)
        self.model = model
        self.sequence = sequence
        layers = layers_of(model)
        table = self.architecture.table
        count = len(layers)
        self.heads = [OverBatch(batch) for _ in range(count)]
        self.neurons = [OverBatch(batch) for _ in range(count)]
        self.channels = [OverBatch(batch) for _ in range(count * len(table.norms) + 1)]
        self.similarity = torch.zeros(count + 1, count + 1, dtype=torch.float64)
        self.stream: list[Tensor] = []  # residual stream before each layer, and after the last
        self.handles: list[Any] = []
        for index, layer in enumerate(layers):
            self._on_input(layer.get_submodule(table.head_input), self._heads(index))
            self._on_input(layer.get_submodule(table.mlp_input), self._units(self.neurons[index]))
            self._on_input(layer, self.stream.append)
            for place, name in enumerate(table.norms):
                self._on_output(layer.get_submodule(name), self._units(self.channels[index * len(table.norms) + place]))
        final = model.get_submodule(table.final_norm)
        self._on_input(final, self.stream.append)
        self._on_output(final, self._units(self.channels[-1]))

    def _on_input(self, module: nn.Module, collect: Callable[[Tensor], None]) -> None:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            collect(arguments[0] if arguments else keywords["hidden_states"])

        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _on_output(self, module: nn.Module, collect: Callable[[Tensor], None]) -> None:
        self.handles.append(module.register_forward_hook(lambda _module, _arguments, output: collect(output)))

    def _units(self, scores: OverBatch) -> Callable[[Tensor], None]:
        return lambda values: scores.add(over_sequence(values, self.sequence))

    def _heads(self, index: int) -> Callable[[Tensor], None]:
        shape = (self.architecture.num_heads, self.architecture.head_dim)

        def collect(values: Tensor) -> None:
            norms = values.float().unflatten(-1, shape).norm(dim=-1)
            self.heads[index].add(over_sequence(norms, self.sequence))

        return collect

    def forward(self, batch: Tensor) -> None:
        self.stream.clear()
        final_hidden(self.model, batch)
        unit = torch.stack([nn.functional.normalize(hidden.float(), dim=-1) for hidden in self.stream])
        self.stream.clear()
        cosine = torch.einsum("irsd,jrsd->ij", unit, unit) / unit.shape[2]  # mean over positions, summed over rows
        self.similarity += cosine.double().cpu()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
