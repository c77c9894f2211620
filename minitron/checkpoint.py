"""A transformers checkpoint on disk, read one tensor at a time and written shard by shard.

Tensors go by the names of the model's parameters. Mixture-of-experts checkpoints store one tensor for each expert where
the model has all of them in one; they are stacked on reading and taken apart again on writing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
IN_MEMORY = "prune it in memory: load it with transformers, then minitron.prune and save_pretrained"

Layout = Mapping[str, tuple[str, ...]]
# End of a parameter's name: ends of the names on disk. `{}` is the expert; several tensors of one expert lie one below
# the other. The first layout of which the checkpoint has a tensor is the one it is in.
LAYOUTS: tuple[Layout, ...] = (
    {  # Mixtral
        "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
        "mlp.experts.gate_up_proj": (
            "block_sparse_moe.experts.{}.w1.weight",
            "block_sparse_moe.experts.{}.w3.weight",
        ),
        "mlp.experts.down_proj": ("block_sparse_moe.experts.{}.w2.weight",),
    },
    {  # Qwen-MoE
        "mlp.experts.gate_up_proj": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
        "mlp.experts.down_proj": ("mlp.experts.{}.down_proj.weight",),
    },
)


class Checkpoint:
    """The safetensors files of a folder. Raises InputError when it has none, or when one of them is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files(folder)  # the file of every tensor on disk
        self._layout = next((layout for layout in LAYOUTS if self._uses(layout)), {})

    def _uses(self, layout: Layout) -> bool:
        ends = tuple(end.format(0) for ends in layout.values() for end in ends)
        return any(name.endswith(ends) for name in self.files)

    def tensor(self, name: str) -> Tensor:
        """A parameter of the model, mapped from the file where it is one tensor there.

        The file is open for this call only, so that the pages of a tensor go when the tensor does. Raises InputError
        naming a tensor that the checkpoint lacks.
        """
        ends = self._ends(name)
        with ExitStack() as stack:
            opened: dict[str, Any] = {}

            def read(stored: str) -> Tensor:
                file = self.files[stored]
                try:
                    if file not in opened:
                        opened[file] = stack.enter_context(safe_open(str(self.folder / file), "pt"))
                    tensor: Tensor = opened[file].get_tensor(stored)
                except (OSError, SafetensorError) as error:
                    raise _damaged(self.folder / file, error) from error
                return tensor

            if "{}" not in ends[0]:
                return read(self._known(ends[0]))
            first = [read(self._known(end.format(0))) for end in ends]
            count = next(n for n in range(1, len(self.files) + 1) if ends[0].format(n) not in self.files)
            stacked = first[0].new_empty(count, sum(len(part) for part in first), *first[0].shape[1:])
            for expert, slot in enumerate(stacked):
                parts = [read(self._known(end.format(expert))) for end in ends]
                torch.cat(parts, out=slot)
            return stacked

    def stored(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors (views of `tensor`) under which a parameter is kept on disk in this checkpoint's layout."""
        ends = self._ends(name)
        if "{}" not in ends[0]:
            yield ends[0], tensor
            return
        for expert, slot in enumerate(tensor):
            for end, part in zip(ends, slot.chunk(len(ends)), strict=True):
                yield end.format(expert), part

    def _ends(self, name: str) -> list[str]:
        """The names on disk of a parameter, with `{}` for the expert."""
        for end, stored in self._layout.items():
            if name.endswith(f".{end}"):
                return [name.removesuffix(end) + part for part in stored]
        return [name]

    def _known(self, stored: str) -> str:
        if stored not in self.files:
            raise InputError(f"{self.folder}: the checkpoint has no tensor {stored!r}", IN_MEMORY)
        return stored


def _files(folder: Path) -> dict[str, str]:
    index, single = folder / INDEX, folder / SINGLE
    if index.exists() and not single.exists():  # transformers' order
        try:
            files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(index, error) from error
        for file in sorted(set(files.values())):
            if Path(file).name != file or not (folder / file).exists():
                raise InputError(f"{folder}: {INDEX} names {file!r}, which is not there", "download or copy it again")
        return files
    if not single.exists():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        found = f"; it has {pickled[0]}, which is not read because a pickle can run code" if pickled else ""
        raise InputError(
            f"{folder}: no {SINGLE} and no {INDEX}{found}",
            "convert it: load it with transformers and save_pretrained, which writes safetensors",
        )
    try:
        with safe_open(str(single), "pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    except (OSError, SafetensorError) as error:
        raise _damaged(single, error) from error


def _damaged(file: Path, error: Exception) -> InputError:
    return InputError(f"{file}: cannot be read ({error})", "download or copy it again")


class ShardWriter:
    """Writes tensors as safetensors shards of at most `shard_bytes` (a larger tensor has one of its own) and their index,
    under the names transformers uses. What it was given stays in memory until its shard is full."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._pending_bytes = self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def _flush(self) -> None:
        save_file(self._pending, str(self.folder / f"{len(self._shards)}.part"), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending.clear()
        self._pending_bytes = 0

    def close(self) -> None:
        """Write what is left, and the index if there are several shards."""
        self._flush()
        count = len(self._shards)
        files = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)] if count > 1 else [SINGLE]
        for number, file in enumerate(files):
            (self.folder / f"{number}.part").rename(self.folder / file)
        if count > 1:
            names = {name: file for file, shard in zip(files, self._shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(names.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
