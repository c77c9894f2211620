"""Forward hooks that measure the importance of heads, neurons, channels and experts in one pass over rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minitron.architecture import Architecture
from minitron.data import DocumentBoundaries
from minitron.importance.aggregate import OverBatch, over_sequence
from minitron.importance.experts import routed
from minitron.importance.similarity import cosine_sums
from minitron.models import final_hidden, layers_of


class Collector:
    """Registers hooks on one model and keeps this process's sums.

    batch, sequence: names of the aggregations over rows and over tokens. pre_activation: score neurons before the MLP's
    activation function. Call `remove` to take the hooks off again.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: str,
        sequence: str,
        *,
        pre_activation: bool,
        documents: DocumentBoundaries | None = None,
    ) -> None:
        architecture = Architecture.from_config(model.config)
        layers = layers_of(model)
        table = architecture.table
        device = next(model.parameters()).device
        count = len(layers)
        width = architecture.intermediate_size
        self.model, self.documents = model, documents
        self.sequence = sequence
        self.pre_activation = pre_activation
        self.head_shape = (architecture.num_heads, architecture.head_dim)
        experts = architecture.num_experts
        self.heads = OverBatch(batch, (count, architecture.num_heads), device)
        self.neurons = OverBatch(batch, (count, experts, width) if experts else (count, width), device)
        self.channels = OverBatch(batch, (count * len(table.norms) + 1, architecture.hidden_size), device)
        self.experts = OverBatch(batch, (count, experts), device) if experts else None
        self.cosines = torch.zeros(count + 1, count + 1, dtype=torch.float64, device=device)
        self.stream: list[Tensor] = []  # residual stream before each layer, and after the last
        self.shape = torch.Size()  # of the current batch
        self.counts = True  # whether what the current batch gives is added
        self.handles: list[Any] = []
        for index, layer in enumerate(layers):
            self._on_input(layer.get_submodule(table.head_input), self._heads(index))
            self._on_input(layer, self.stream.append)
            if experts:
                self._on_routed(layer.get_submodule(table.experts), index)
            else:
                module = layer.get_submodule(table.activation if pre_activation else table.mlp_input)
                self._on_input(module, self._units(self.neurons, index))
            for norm, name in enumerate(table.norms, start=index * len(table.norms)):
                self._on_output(layer.get_submodule(name), self._units(self.channels, norm))
        final = model.get_submodule(table.final_norm)
        self._on_input(final, self.stream.append)
        self._on_output(final, self._units(self.channels, -1))

    def forward(self, batch: Tensor, *, counts: bool = True) -> None:
        """Run the model on rows, int64 [n, seq_length], on the model's device, and if it counts add what the hooks measure."""
        self.stream.clear()
        self.shape = batch.shape
        self.counts = counts
        final_hidden(self.model, batch, self.documents)
        if counts:
            self.cosines += cosine_sums(self.stream)
        self.stream.clear()

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self.handles:
            handle.remove()

    def _on_input(self, module: nn.Module, collect: Callable[[Tensor], None]) -> None:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if self.counts:
                collect(arguments[0] if arguments else keywords["hidden_states"])

        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _on_output(self, module: nn.Module, collect: Callable[[Tensor], None]) -> None:
        def hook(_: nn.Module, _arguments: tuple[Any, ...], output: Tensor) -> None:
            if self.counts:
                collect(output)

        self.handles.append(module.register_forward_hook(hook))

    def _on_routed(self, module: nn.Module, layer: int) -> None:
        def hook(_: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
            if self.counts:
                self._routed(layer, module, *arguments)

        self.handles.append(module.register_forward_pre_hook(hook))

    def _units(self, scores: OverBatch, index: int) -> Callable[[Tensor], None]:
        return lambda values: scores.add(index, over_sequence(values, self.sequence))

    def _heads(self, layer: int) -> Callable[[Tensor], None]:
        def collect(values: Tensor) -> None:
            norms = values.float().unflatten(-1, self.head_shape).norm(dim=-1)
            self.heads.add(layer, over_sequence(norms, self.sequence))

        return collect

    def _routed(self, layer: int, experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        """Add the scores of one layer's experts. Tokens not routed to an expert count as zero for it and its neurons."""
        assert self.experts is not None
        norms = hidden.new_zeros((len(hidden), self.experts.total.shape[-1]), dtype=torch.float32)
        for expert, tokens, neurons, norm in routed(
            experts, hidden, index, weights, pre_activation=self.pre_activation
        ):
            norms[tokens, expert] = norm
            values = neurons.new_zeros((len(hidden), neurons.shape[-1])).index_copy_(0, tokens, neurons)
            self.neurons.add((layer, expert), over_sequence(values.unflatten(0, self.shape), self.sequence))
        self.experts.add(layer, over_sequence(norms.unflatten(0, self.shape), self.sequence))
