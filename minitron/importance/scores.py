"""Importance scores of all axes from one calibration; saved once and reused for every candidate."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from minitron.errors import InputError, StorageError, one_line
from minitron.storage import write_bytes

LONGEST_REASON = 250
WEIGHTS = "weights"  # key of the provenance: the sample of the model's weights, see `minitron.checkpoints.sample`


@dataclass(frozen=True)
class ImportanceScores:
    """Scores of every prunable unit; larger is more important. All tensors are float32.

    Raises InputError for a NaN, which would be ranked as more important than any number.
    """

    heads: Tensor = field(repr=False)
    """[layers, heads]"""
    neurons: Tensor = field(repr=False)
    """[layers, MLP], or [layers, experts, MLP] for a mixture of experts."""
    channels: Tensor = field(repr=False)
    """[hidden]"""
    similarity: Tensor = field(repr=False)
    """[layers + 1, layers + 1]: mean cosine between the residual stream before layer i and before layer j."""
    experts: Tensor | None = field(default=None, repr=False)
    """[layers, experts], or None for a dense model."""
    removal: dict[str, dict[int, Tensor]] = field(default_factory=dict, repr=False)
    """{metric: {n: [layers - n + 1]}}: the metric without the n layers from each start. "loss" (nats per token),
    "logit_error" (normalised squared error of the logits), "cosine" or "task:NAME" (accuracy lost)."""
    orders: dict[str, dict[int, list[int]]] = field(default_factory=dict, repr=False)
    """{metric: {n: layers in the order of iterative removal, n at a time}}."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """JSON values: rows and settings that the scores were computed with."""

    def __post_init__(self) -> None:
        for name, tensor in self._tensors().items():
            if count := int(tensor.isnan().sum()):
                raise InputError(
                    f"scores: {count:,} of {tensor.numel():,} values of {name} are not numbers",
                    "calibrate in bfloat16 or float32, in which activations do not overflow, and check the model's weights",
                )

    @property
    def layers(self) -> Tensor:
        """Importance of single layers, [layers]: the loss without each if it was measured, else 1 - cosine (Block Importance
        of ShortGPT; arXiv 2407.14679 section 2.2)."""
        return self.blocks(1)

    def blocks(self, size: int, metric: str | None = None) -> Tensor:
        """Importance of every contiguous block of `size` layers, [layers - size + 1].

        metric: "cosine" (any size) or a key of `removal`; None: "loss" if it was measured for this size, else "cosine".
        Raises InputError naming the available ones for a metric or size that was not measured.
        """
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
        """Write one safetensors file, with the provenance in its metadata. Raises StorageError if it cannot be written."""
        data = save(
            {name: tensor.contiguous() for name, tensor in self._tensors().items()},
            metadata={"provenance": json.dumps(self.provenance, sort_keys=True)},
        )
        write_bytes(str(path), data)  # save_file would create a file that only its owner can read

    def _tensors(self) -> dict[str, Tensor]:
        """All scores, by their names in a file."""
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
        return tensors

    @classmethod
    def load(cls, path: str | Path) -> ImportanceScores:
        """Read a file that `save` wrote. Raises StorageError naming the file if it cannot be read."""
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
            scores = cls(**tensors, removal=removal, orders=orders, provenance=provenance)
            scores._check()
            return scores
        except (OSError, SafetensorError, TypeError, ValueError, RuntimeError, InputError) as error:
            raise StorageError(
                f"{path}: cannot be read as importance scores ({one_line(error, LONGEST_REASON)})",
                "give a file that ImportanceScores.save or a calibration wrote; if it is one, it is damaged: calibrate again",
            ) from error

    def _check(self) -> None:
        """Raise ValueError unless shapes and types are those that the attributes document; a file may have any."""
        if not isinstance(self.provenance, dict):
            raise ValueError("its provenance is not an object of keys and values")
        ranks = {"heads": (2,), "neurons": (2, 3), "channels": (1,), "similarity": (2,), "experts": (2,)}
        for name, allowed in ranks.items():
            tensor = getattr(self, name)
            if tensor is not None and not (tensor.is_floating_point() and tensor.ndim in allowed and tensor.numel()):
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
        layers = len(self.heads)
        if self.similarity.shape != (layers + 1, layers + 1) or len(self.neurons) != layers:
            raise ValueError(f"its tensors are not all of {layers} layers")
        for metric, sizes in self.removal.items():
            for size, values in sizes.items():
                if not (values.is_floating_point() and values.shape == (layers - size + 1,) and 0 < size <= layers):
                    raise ValueError(f"removal/{metric}/{size} is {values.dtype} {list(values.shape)}")
        for metric, sequences in self.orders.items():
            for size, order in sequences.items():
                if not _is_order(order, layers) or size < 1:
                    raise ValueError(f"orders/{metric}/{size} is not an order of layers")


def _is_order(order: Any, layers: int) -> bool:
    """Whether `order` lists distinct layers of a model with `layers` layers."""
    if not isinstance(order, list) or not all(isinstance(layer, int) and 0 <= layer < layers for layer in order):
        return False
    return len(set(order)) == len(order)
