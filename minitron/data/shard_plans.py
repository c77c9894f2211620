"""What each shard of the rows consists of, written down when all documents are placed, so that shards can be written in any
order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Set
from dataclasses import dataclass, field

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from minitron.data.placing import Placement
from minitron.data.rows import Split, shard_name
from minitron.data.spans import SPAN, divided
from minitron.data.tokenising import SPLITS
from minitron.errors import StorageError
from minitron.storage import join, read_bytes, write_bytes


@dataclass(frozen=True)
class ShardPlan:
    """files: names of the files with the tokens. spans: of dtype SPAN, in order; `block` is the number of a file, `start` the
    position of a token in it. begins: positions among the tokens of the spans at which a row starts inside a document."""

    files: tuple[str, ...]
    spans: np.ndarray
    begins: np.ndarray

    def to_bytes(self) -> bytes:
        """Equal plans are equal bytes."""
        files = np.frombuffer("\n".join(self.files).encode(), np.uint8)
        spans = np.ascontiguousarray(self.spans).view(np.int64).reshape(-1, 3)
        return bytes(save({"files": files, "spans": spans, "begins": self.begins}))

    @classmethod
    def read(cls, path: str) -> ShardPlan:
        """Raises StorageError for a damaged file."""
        try:
            tensors = load(read_bytes(path))
            spans = np.ascontiguousarray(tensors["spans"]).reshape(-1).view(SPAN)
            return cls(tuple(tensors["files"].tobytes().decode().split("\n")), spans, tensors["begins"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise StorageError(f"{path}: damaged ({error})", "delete its folder and run again") from error


@dataclass
class _Shard:
    """A shard whose tokens are still coming."""

    name: str
    spans: list[np.ndarray] = field(default_factory=list)
    begins: list[np.ndarray] = field(default_factory=list)
    tokens: int = 0

    def add(self, spans: np.ndarray, begins: np.ndarray) -> None:
        self.spans.append(spans)
        self.begins.append(begins + self.tokens)
        self.tokens += int(spans["tokens"].sum())


class ShardPlans:
    """A `Sink` that writes the plans of all shards into a folder. `files` has the file names of the blocks that were read.

    written: SHA-256 of each plan, by the name of the shard.
    """

    def __init__(self, folder: str) -> None:
        self.files: list[str] = []
        self.written: dict[str, str] = {}
        self._folder = folder
        self._shards: dict[Split, _Shard] = {}
        self._counts: dict[Split, int] = dict.fromkeys(SPLITS, 0)

    def place(self, split: Split, placement: Placement) -> None:
        spans, begins = placement.spans, placement.begins
        at = 0
        for shard in placement.shards.tolist():
            before, spans = divided(spans, shard - at)
            self._add(split, before, begins[begins < shard] - at)
            begins, at = begins[begins >= shard], shard
            self._close(split)
            self._shards[split] = _Shard(shard_name(split, self._counts[split]))
            self._counts[split] += 1
        self._add(split, spans, begins - at)

    def keep(self, blocks: Set[int]) -> None:
        pass

    def close(self) -> None:
        """Write the plans of the last shards."""
        for split in SPLITS:
            self._close(split)

    def _add(self, split: Split, spans: np.ndarray, begins: np.ndarray) -> None:
        if len(spans):
            self._shards[split].add(spans, begins)

    def _close(self, split: Split) -> None:
        shard = self._shards.pop(split, None)
        if shard is None:
            return
        spans = np.concatenate(shard.spans)
        blocks, spans["block"] = np.unique(spans["block"], return_inverse=True)
        plan = ShardPlan(tuple(self.files[block] for block in blocks), spans, np.concatenate(shard.begins)).to_bytes()
        sha256 = hashlib.sha256(plan).hexdigest()
        write_bytes(plan_path(self._folder, shard.name, sha256), plan)
        self.written[shard.name] = sha256


def plan_path(folder: str, shard: str, sha256: str) -> str:
    """The address of a shard's plan with this hash."""
    return join(folder, f"{shard}-{sha256[:16]}.safetensors")


def batches(tokens: Iterator[np.ndarray], begins: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Arrays of tokens joined to about `size`, each with those of the positions `begins` that are in it, counted from its first
    token."""
    waiting: list[np.ndarray] = []
    waits = at = 0
    for more in tokens:
        waiting.append(more)
        waits += len(more)
        if waits >= size:
            yield np.concatenate(waiting), begins[(begins >= at) & (begins < at + waits)] - at
            at += waits
            waiting, waits = [], 0
    if waiting:
        yield np.concatenate(waiting), begins[begins >= at] - at
