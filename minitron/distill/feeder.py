"""Micro-batches on the device, each read and copied while the one before is computed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from minitron.data import Rows
from minitron.device import on_this_gpu
from minitron.distill.teacher.live import Targets, TeacherBatch
from minitron.distill.teacher.stored import StoredTeacher
from minitron.distill.teacher.top_k import TopKTeacher


class MicroBatch(NamedTuple):
    tokens: Tensor
    """int64 [rows, seq_length]."""
    stored: TeacherBatch | None
    """What is stored of the teacher on these rows; None for other targets, which are run when they are needed."""


class Feeder:
    """Reads `rows`, and what is stored of their teacher, in a thread of its own.

    On a GPU that thread copies through pinned memory in a stream of its own: neither the host nor the GPU waits for a copy.
    """

    def __init__(self, rows: Rows, targets: Targets | None, device: torch.device) -> None:
        self.rows, self.targets, self.device = rows, targets, device
        self.is_stored = isinstance(targets, StoredTeacher | TopKTeacher)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="feeder", initializer=on_this_gpu())
        self._next: tuple[list[int], Future[tuple[MicroBatch, Any]]] | None = None

    def __enter__(self) -> Feeder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)

    def expect(self, indices: Sequence[int]) -> None:
        """Tell the targets which rows are needed soon; those that are being loaded already are not read again."""
        if self.targets is not None:
            loading = self._next[0] if self._next else []
            self._reader.submit(self.targets.prefetch, [index for index in indices if index not in loading])

    def take(self, indices: Sequence[int], following: Sequence[int] | None) -> MicroBatch:
        """The rows with these numbers; starts to read the `following` ones, which the next call takes."""
        expected, self._next = self._next, None
        if expected is None or expected[0] != list(indices):
            expected = list(indices), self._reader.submit(self._load, indices)
        if following is not None:
            self._next = list(following), self._reader.submit(self._load, following)
        batch, copied = expected[1].result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for leaf in tree_leaves(batch):
                if isinstance(leaf, Tensor):
                    leaf.record_stream(current)  # not to be used again for copies before that stream is done with it
        return batch

    def _load(self, indices: Sequence[int]) -> tuple[MicroBatch, Any]:
        tokens = self.rows.take(indices)
        batch = MicroBatch(tokens, None)
        if self.is_stored:
            assert self.targets is not None
            batch = MicroBatch(tokens, self.targets.batch(indices, tokens))
        if self._stream is None:
            return tree_map_only(Tensor, lambda tensor: tensor.to(self.device), batch), None
        with torch.cuda.stream(self._stream):
            batch = tree_map_only(Tensor, self._copied, batch)
            return batch, self._stream.record_event()

    def _copied(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)  # itself if it is pinned
