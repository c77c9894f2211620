"""The result of one calibration pass, for every axis at once; saved, and reused by every candidate."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from minitron.errors import InputError, StorageError
from minitron.storage import write_bytes


@dataclass(frozen=True)
class ImportanceScores:
    """Scores of every prunable unit; larger is more important. All float32.

    heads [layers, heads] · neurons [layers, MLP], or [layers, experts, MLP] for a mixture of experts · channels [hidden] ·
    similarity [layers + 1, layers + 1], mean cosine between the residual stream before layer i and before layer j ·
    experts [layers, experts], or None for a dense model ·
    removal {metric: {n: [layers - n + 1]}}, what happens without the n layers from each start on: "loss" (nats per token),
    "logit_error" (normalised squared error of the logits) or "task:NAME" (accuracy lost) ·
    orders {metric: {n: layers in the order in which iterative removal takes them, n at a time}}.
    `provenance` says what they were computed from.
    """

    heads: Tensor
    neurons: Tensor
    channels: Tensor
    similarity: Tensor
    experts: Tensor | None = None
    removal: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    orders: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> Tensor:
        """Importance of single layers [layers]: the loss without each where measured, else 1 - cosine (Block Importance,
        ShortGPT; arXiv 2407.14679 section 2.2)."""
        return self.blocks(1)

    def blocks(self, size: int, metric: str | None = None) -> Tensor:
        """Importance of every contiguous block of `size` layers, [layers - size + 1].

        `metric`: "cosine" (of any size) or a key of `removal`; None = "loss" where this size was measured, else "cosine".
        Raises InputError naming what was measured."""
        measured = self.removal.get(metric or "loss", {})
        if size in measured:
            return measured[size]
        if metric in (None, "cosine") and 0 < size < len(self.similarity):
            return 1 - torch.diagonal(self.similarity, offset=size)
        known = [f"{name} for {', '.join(map(str, sorted(sizes)))}" for name, sizes in self.removal.items()]
        raise InputError(
            f"blocks of {size} layers by {metric or 'cosine'}: these scores have {'; '.join([*known, 'cosine'])} "
            f"of {len(self.similarity) - 1} layers",
            "use one of these, or calibrate again with this metric and size",
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, with the provenance in its header."""
        tensors = {
            "heads": self.heads,
            "neurons": self.neurons,
            "channels": self.channels,
            "similarity": self.similarity,
            **{f"removal/{m}/{size}": values for m, sizes in self.removal.items() for size, values in sizes.items()},
            **{f"orders/{m}/{size}": torch.tensor(o) for m, sizes in self.orders.items() for size, o in sizes.items()},
        }
        if self.experts is not None:
            tensors["experts"] = self.experts
        data = save(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            metadata={"provenance": json.dumps(self.provenance, sort_keys=True)},
        )
        write_bytes(str(path), data)  # save_file would keep everybody else from reading it

    @classmethod
    def load(cls, path: str | Path) -> ImportanceScores:
        """Read what `save` wrote. Raises StorageError naming the file if it cannot be read."""
        try:
            with safe_open(str(path), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                provenance = json.loads((file.metadata() or {}).get("provenance", "{}"))
            removal: dict[str, dict[int, Tensor]] = {}
            orders: dict[str, dict[int, list[int]]] = {}
            for name in [name for name in tensors if "/" in name]:
                kind, metric, size = name.split("/")
                values = tensors.pop(name)
                if kind == "orders":
                    orders.setdefault(metric, {})[int(size)] = values.tolist()
                else:
                    removal.setdefault(metric, {})[int(size)] = values
            return cls(**tensors, removal=removal, orders=orders, provenance=provenance)
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise StorageError(f"{path}: cannot be read as importance scores ({error})", "calibrate again") from error
