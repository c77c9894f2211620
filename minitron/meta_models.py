"""Models on the meta device, and their weights: read from a checkpoint, and written to one, a tensor at a time.

A model too large for one process, or for one copy in each process of a node, is built without memory for its weights. Each
process then reads the rows of each parameter that it holds, and no others.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from minitron.architecture import Architecture
from minitron.attention import use_own_attention
from minitron.checkpoints.companions import check_links
from minitron.checkpoints.contents import check_tied, filled
from minitron.checkpoints.files import Checkpoint, ShardWriter
from minitron.checkpoints.headers import read_headers
from minitron.checkpoints.reading import quiet_transformers, read_config
from minitron.families.config import make_plain
from minitron.logits import Head
from minitron.model_imports import import_models
from minitron.models import is_finite, is_other_attention, load_model, not_finite
from minitron.sharded_tensors import is_dtensor, whole

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FILE_BYTES = 2 << 30
"""Largest size of a file that is written. Its tensors wait in main memory until it is full."""
GENERATION = "generation_config.json"


class Weights(Protocol):
    """Where the parameters of a model on the meta device are read from, such as a `Checkpoint`."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` along the first dimension of the parameter of this name, in any floating dtype."""
        ...


class InMemory:
    """The parameters of a model in memory, by name."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop]


class Finite:
    """The parameters of `weights`, each of which is refused with an InputError if a value in it is not finite.

    where: the name of the model in the error.
    """

    def __init__(self, weights: Weights, where: str) -> None:
        self.weights, self.where = weights, where

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = self.weights.rows(name, start, stop)
        if not is_finite(rows):
            raise not_finite(self.where, [name])
        return rows


def on_meta(model: nn.Module) -> bool:
    """Whether the weights of a model are still to be read."""
    return next(model.parameters()).is_meta


def emptied(model: nn.Module) -> nn.Module:
    """A copy of a model with its parameters on the meta device."""
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, dict(empty))


class MetaModel(NamedTuple):
    """A causal language model whose parameters are on the meta device, in eval mode, and the checkpoint they are read from."""

    model: nn.Module
    weights: Checkpoint


def open_model(folder: str | Path, dtype: torch.dtype) -> MetaModel:
    """The model of a local checkpoint folder, in `dtype`. Only the headers of its safetensors files are read.

    Raises InputError unless these hold the tensors of the model in config.json.
    """
    import_models()
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    config, weights = _opened(folder)
    with quiet_transformers(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    use_own_attention(model.config)
    if (weights.folder / GENERATION).exists():  # such as the tokens that end an answer
        check_links(weights.folder)
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return MetaModel(model.eval(), weights)


def load_onto(folder: str | Path, dtype: torch.dtype, target: torch.device) -> nn.Module:
    """The model of a local checkpoint folder, in eval mode on the device `target`.

    A GPU gets one tensor after another: main memory then never has a copy of the model, of which a node would need one for
    each of its processes where tensors are not used as they are stored, such as experts that are stacked. Raises as
    `minitron.models.load_model` does.
    """
    if target.type == "cpu":
        return load_model(folder, dtype)
    model, weights = open_model(folder, dtype)
    read_(model, weights, dtype, target)
    return model


def read_head(folder: str | Path, dtype: torch.dtype) -> Head:
    """The head of the model of a local checkpoint folder, in main memory; nothing else is read. Raises as `open_model` does."""
    config, weights = _opened(folder)
    table = Architecture.from_config(config).table
    name = table.embedding if Architecture.from_config(config).tied else table.head
    return Head.from_config(weights.tensor(name).to(dtype, copy=True), config)


def _opened(folder: str | Path) -> tuple[Any, Checkpoint]:
    config = read_config(str(folder), str(folder), trust_remote_code=False, local_files_only=True)
    if is_other_attention(config):
        config._attn_implementation = None
    architecture = Architecture.from_config(config)
    weights = Checkpoint(Path(folder), filled(read_headers(Path(folder)), architecture, str(folder)))
    check_tied(weights, architecture)
    return config, weights


@torch.no_grad()
def read_(model: nn.Module, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter of `model` that is on the meta device memory on `device`, and its values, rounded to `dtype`.

    Of a DTensor that is sharded along its first dimension, each process reads its own rows. Parameters keep the dtype that
    they have, which may be wider; parameters that modules share stay shared, by the name in the first module.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type != "meta":
                continue
            if parameter not in made:
                name = f"{prefix}.{key}" if prefix else key
                made[parameter] = nn.Parameter(
                    _read(parameter, name, weights, dtype, device), requires_grad=parameter.requires_grad
                )
            module.register_parameter(key, made[parameter])
    for buffer_owner in model.modules():
        for key, buffer in buffer_owner.named_buffers(recurse=False):
            buffer_owner._buffers[key] = buffer.to(device)


def _read(parameter: Tensor, name: str, weights: Weights, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not is_dtensor(parameter):
        rows = weights.rows(name, 0, len(parameter)).to(dtype)
        return torch.empty_like(parameter, device=device).copy_(rows)
    from torch.distributed.tensor import DTensor

    local = torch.empty_like(parameter.to_local(), device=device)
    start = _first_row(parameter)
    local.copy_(weights.rows(name, start, start + len(local)).to(dtype))
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _first_row(parameter: DTensor) -> int:
    """The number of this process's first row; shards are of equal size, but for the last ones."""
    from torch.distributed.tensor import Shard

    dimension = parameter.placements.index(Shard(0))
    size = -(-len(parameter) // parameter.device_mesh.size(dimension))
    return min(len(parameter), size * parameter.device_mesh.get_local_rank(dimension))


@torch.no_grad()
def write_model(model: nn.Module, weights: Checkpoint, dtype: torch.dtype, folder: Path | None) -> None:
    """Write a transformers checkpoint of `model`, rounded to `dtype`, to `folder`: its config and safetensors, in the layout
    of `weights`, which it was opened with.

    All processes that hold a part of it call this together; the one with a `folder` writes. It never has more in main memory
    than a file of FILE_BYTES, or one larger parameter; every process has one whole parameter at a time on its device.
    """
    writer = ShardWriter(folder, FILE_BYTES) if folder else None
    for name, gathered in _gathered(model, dtype):
        if writer:
            for stored, part in weights.stored(name, gathered.cpu()):
                writer.add(stored, part.contiguous())
        del gathered  # before the next one is gathered
    if writer is None or folder is None:
        return
    writer.close()
    config: Any = model.config
    config.dtype = dtype
    make_plain(config)
    config.save_pretrained(str(folder))
    if (weights.folder / GENERATION).exists():
        check_links(weights.folder)
        shutil.copyfile(weights.folder / GENERATION, folder / GENERATION)


def _gathered(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, whole(parameter.detach().to(dtype))
