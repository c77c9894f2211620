"""The result of one calibration pass, for every axis at once; saved, and reused by every candidate."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron.errors import StorageError


@dataclass(frozen=True)
class ImportanceScores:
    """Scores of every prunable unit; larger is more important. All float32.

    heads [layers, heads] · neurons [layers, MLP] · channels [hidden] ·
    similarity [layers + 1, layers + 1], mean cosine between the residual stream before layer i and before layer j ·
    block_loss {n: [layers - n + 1]}, language-model loss (nats per token) with the n layers from each start on removed.
    `provenance` says what they were computed from.
    """

    heads: Tensor
    neurons: Tensor
    channels: Tensor
    similarity: Tensor
    block_loss: dict[int, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> Tensor:
        """Importance of single layers [layers]: the loss without each where measured, else 1 - cosine (Block Importance,
        ShortGPT; arXiv 2407.14679 section 2.2)."""
        return self.blocks(1)

    def blocks(self, size: int) -> Tensor:
        """Importance of every contiguous block of `size` layers, [layers - size + 1]."""
        if size in self.block_loss:
            return self.block_loss[size]
        return 1 - torch.diagonal(self.similarity, offset=size)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, with the provenance in its header."""
        tensors = {
            "heads": self.heads,
            "neurons": self.neurons,
            "channels": self.channels,
            "similarity": self.similarity,
            **{f"block_loss.{size}": values for size, values in self.block_loss.items()},
        }
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            str(path),
            metadata={"provenance": json.dumps(self.provenance, sort_keys=True)},
        )

    @classmethod
    def load(cls, path: str | Path) -> ImportanceScores:
        """Read what `save` wrote. Raises StorageError naming the file if it cannot be read."""
        try:
            with safe_open(str(path), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                provenance = json.loads((file.metadata() or {}).get("provenance", "{}"))
            blocks = {int(k.split(".")[1]): tensors.pop(k) for k in list(tensors) if k.startswith("block_loss.")}
            return cls(**tensors, block_loss=blocks, provenance=provenance)
        except (OSError, SafetensorError, TypeError) as error:
            raise StorageError(f"{path}: cannot be read as importance scores ({error})", "calibrate again") from error
