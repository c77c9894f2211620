"""A transformers checkpoint on disk, read one tensor at a time and written shard by shard.

Tensors are addressed by the names of the model's parameters. Mixture-of-experts checkpoints store one tensor per expert where
the model has one parameter for all; they are stacked on reading and split again on writing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron.checkpoints.headers import INDEX, SINGLE, Header, damaged

Layout = Mapping[str, tuple[str, ...]]
# Suffix of a parameter's name -> suffixes of the names on disk. `{}` is the expert's number; several tensors of one expert are
# concatenated along dimension 0. A checkpoint has the first layout of which it contains a tensor.
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


def layout_of(names: Collection[str]) -> Layout:
    """The layout of a checkpoint with tensors of these names."""

    def uses(layout: Layout) -> bool:
        ends = tuple(end.format(0) for ends in layout.values() for end in ends)
        return any(name.endswith(ends) for name in names)

    return next((layout for layout in LAYOUTS if uses(layout)), {})


def stored_parts(name: str, tensor: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """(name, view of `tensor`) of each tensor on disk that a parameter of the model is stored as."""
    ends = _ends(name, layout)
    if "{}" not in ends[0]:
        yield ends[0], tensor
        return
    for expert, slot in enumerate(tensor):
        for end, part in zip(ends, slot.chunk(len(ends)), strict=True):
            yield end.format(expert), part


def _ends(name: str, layout: Layout) -> list[str]:
    """The names on disk of a parameter, with `{}` for the expert."""
    for end, stored in layout.items():
        if name.endswith(f".{end}"):
            return [name.removesuffix(end) + part for part in stored]
    return [name]


class _Files:
    """Safetensors files of a folder, each opened when it is first read and closed with `stack`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.opened: dict[str, Any] = {}

    def tensor(self, header: Header) -> Tensor:
        return self._read(header, lambda file: file.get_tensor(header.name))

    def rows(self, header: Header, start: int, stop: int) -> Tensor:
        return self._read(header, lambda file: file.get_slice(header.name)[start : max(start, stop)])

    def _read(self, header: Header, read: Callable[[Any], Tensor]) -> Tensor:
        path = self.folder / header.file
        try:
            if header.file not in self.opened:
                self.opened[header.file] = self.stack.enter_context(safe_open(str(path), "pt"))
            return read(self.opened[header.file])
        except (OSError, SafetensorError) as error:
            raise damaged(path, error) from error


class Checkpoint:
    """The safetensors files of a folder, by `headers` that fill the model (see `minitron.checkpoints.contents`)."""

    def __init__(self, folder: Path, headers: Mapping[str, Header]) -> None:
        self.folder = folder
        self.headers = headers
        self._layout = layout_of(headers.keys())

    def tensor(self, name: str) -> Tensor:
        """A parameter of the model; memory-mapped if it is stored as one tensor.

        The file is open for this call only, so that a tensor's pages are released with the tensor. Raises InputError naming
        a file that is damaged.
        """
        ends = _ends(name, self._layout)
        with ExitStack() as stack:
            files = _Files(self.folder, stack)
            if "{}" not in ends[0]:
                return files.tensor(self.headers[ends[0]])
            return self._experts(files, ends, 0, self._num_experts(ends))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` along the first dimension of a parameter; no others are read. Raises InputError as `tensor`
        does."""
        ends = _ends(name, self._layout)
        with ExitStack() as stack:
            files = _Files(self.folder, stack)
            if "{}" not in ends[0]:
                return files.rows(self.headers[ends[0]], start, stop)
            return self._experts(files, ends, start, stop)

    def _num_experts(self, ends: list[str]) -> int:
        return next(n for n in range(1, len(self.headers) + 1) if ends[0].format(n) not in self.headers)

    def _experts(self, files: _Files, ends: list[str], start: int, stop: int) -> Tensor:
        """The experts from `start` to `stop`, stacked, of a parameter that is stored as the tensors `ends` of each."""
        first = [files.tensor(self.headers[end.format(0)]) for end in ends]
        stacked = first[0].new_empty(max(0, stop - start), sum(len(part) for part in first), *first[0].shape[1:])
        for expert, slot in enumerate(stacked, start=start):
            torch.cat([files.tensor(self.headers[end.format(expert)]) for end in ends], out=slot)
        return stacked

    def stored(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, view of `tensor`) of each tensor on disk that a parameter is stored as in this checkpoint's layout."""
        return stored_parts(name, tensor, self._layout)


class ShardWriter:
    """Writes tensors as safetensors shards of at most `shard_bytes` bytes (a larger tensor gets its own shard) and an index
    under transformers' file names. Tensors stay in memory until their shard is full."""

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
        """Write the last shard, and the index if there are several."""
        self._flush()
        count = len(self._shards)
        files = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)] if count > 1 else [SINGLE]
        for number, file in enumerate(files):
            (self.folder / f"{number}.part").rename(self.folder / file)
        if count > 1:
            names = {name: file for file, shard in zip(files, self._shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(names.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
