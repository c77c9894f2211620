"""A sample of a model's weights, which tells two models of the same shape apart without reading them whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from minitron.architecture import Architecture
from minitron.checkpoints.contents import filled
from minitron.checkpoints.files import Checkpoint
from minitron.checkpoints.headers import read_headers
from minitron.checkpoints.reading import read_config
from minitron.sharded_tensors import whole

VALUES = 256  # of each parameter, the first ones


def model_sample(model: nn.Module) -> str:
    """A hash of the first values of every parameter of a model, 16 hexadecimal digits.

    The values are rounded to bfloat16, so that a model has the same sample in float32, float16 and bfloat16. All processes of
    a sharded model call this.
    """
    parameters = dict(model.named_parameters())

    def first_rows(name: str, rows: int) -> Tensor:
        return whole(parameters[name].detach())[:rows]

    return _hash(Architecture.from_config(model.config), first_rows)


def checkpoint_sample(folder: Path) -> str:
    """`model_sample` of the model in a checkpoint folder, of which a row of each matrix is read. Raises InputError for a folder
    that is not a complete checkpoint in safetensors."""
    config = read_config(str(folder), str(folder), trust_remote_code=False, local_files_only=True)
    architecture = Architecture.from_config(config)
    checkpoint = Checkpoint(folder, filled(read_headers(folder), architecture, str(folder)))
    return _hash(architecture, lambda name, rows: checkpoint.rows(name, 0, rows))


def _hash(architecture: Architecture, first_rows: Callable[[str, int], Tensor]) -> str:
    digest = hashlib.sha256()
    table = architecture.table
    names = [(parameter.name, parameter) for parameter in architecture.outer_parameters]
    for layer in range(architecture.num_layers):
        names += [(f"{table.layers}.{layer}.{p.name}", p) for p in architecture.layer_parameters]
    for name, parameter in names:
        rows = VALUES if len(parameter.axes) == 1 else 1
        values = first_rows(name, rows).flatten()[:VALUES].to("cpu", torch.bfloat16)
        digest.update(name.encode() + values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
