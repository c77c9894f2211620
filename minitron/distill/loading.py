"""Models that several processes load: whole in each if they fit on its GPU, otherwise with their layers split over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron.device import device
from minitron.distill.sharding import shard_teacher_
from minitron.meta_models import Finite, Weights, load_onto, open_model, read_
from minitron.models import load_source, plain_folder, source_architecture, source_folder, source_tokenizer
from minitron.processes import in_turn, largest, world_size

FREE_SHARE = 0.8
"""Share of a GPU's free memory that weights may take; the rest is for activations and logits."""


def fit_whole(folders: Sequence[str | Path], dtype: torch.dtype) -> bool:
    """Whether the models of these local checkpoint folders fit together on the GPU of every process; always true on CPUs, and
    for a process alone. All processes of torch.distributed call this alike."""
    if device().type != "cuda" or world_size() == 1:
        return True
    needed = sum(source_architecture(str(folder))[0].num_parameters for folder in folders) * dtype.itemsize
    free, _ = torch.cuda.mem_get_info()
    return largest([needed > FREE_SHARE * free]) == [0]


def load_split(folder: str | Path, dtype: torch.dtype) -> nn.Module:
    """The model of a local checkpoint folder, to be run forward only, with its layers split over all processes of
    torch.distributed, which call this alike. No process ever has the whole model.

    All processes then have to make equally many forward passes: each layer is gathered by all of them while it runs. The head
    and all else outside the layers is in every process. Raises InputError as `open_model` does.
    """
    model, weights = open_model(folder, dtype)
    return _split(model, weights, dtype)


def _split(model: nn.Module, weights: Weights, dtype: torch.dtype) -> nn.Module:
    target = device()
    model.requires_grad_(False)
    shard_teacher_(model, target)
    read_(model, weights, dtype, target)
    return model


def load_together(folder: str | Path, dtype: torch.dtype) -> nn.Module:
    """The model of a local checkpoint folder in eval mode on `minitron.device.device()`, whole if it fits and otherwise as
    `load_split` loads it. All processes of torch.distributed call this alike."""
    return load_onto(folder, dtype, device()) if fit_whole([folder], dtype) else load_split(folder, dtype)


def load_source_together(source: str, dtype: torch.dtype, *, together: bool) -> tuple[nn.Module, Any]:
    """The model, in eval mode on `minitron.device.device()`, and the tokenizer of a model source.

    together: whether all processes of torch.distributed call this alike; the model is then split over them if it does not fit
    on each one's GPU. A GPU gets one tensor after another, so that main memory never has a copy of the model; of a source that
    has to be converted (a GGUF file, quantised weights, pickles) one process of each node at a time has one.

    Raises InputError as `minitron.models.load_source` does, and for a GGUF file that does not fit.
    """
    target = device()
    if together and not fit_whole([source], dtype):
        model, weights = open_model(source_folder(source), dtype)
        return _split(model, Finite(weights, source), dtype), source_tokenizer(source)
    if target.type == "cpu":
        return _converted(source, dtype, target)
    folder = plain_folder(source)
    if folder is None:
        with in_turn(together):
            return _converted(source, dtype, target)
    model, weights = open_model(folder, dtype)
    read_(model, Finite(weights, source), dtype, target)
    return model, source_tokenizer(source)


def _converted(source: str, dtype: torch.dtype, target: torch.device) -> tuple[nn.Module, Any]:
    model, tokenizer = load_source(source, dtype=dtype)
    return model.to(target).eval(), tokenizer
