"""The teacher's most likely next tokens, stored for rows. They take less space than hidden states and are not exact.

The probability of all other tokens is lost: the student learns the teacher's distribution truncated to k tokens and
renormalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from minitron.data import DocumentBoundaries, Rows
from minitron.distill.teacher.live import TeacherBatch, TopK
from minitron.distill.teacher.shard_writing import RowModel, Writing, write_shards
from minitron.distill.teacher.shards import Shards
from minitron.errors import InputError, StorageError
from minitron.logits import Head, cache_buffer, log_softmax_slices_
from minitron.models import final_hidden


class MassLost(NamedTuple):
    """Probability of a token's distribution outside its k most likely tokens."""

    mean: float
    worst: float
    """The largest of all tokens."""


class TopKTeacher:
    """The most likely tokens read back from a store that `store_top_k` completed; distil with `Losses(top_k=k)`.

    Raises StorageError if the store is not complete, was made from another teacher or other rows, or is damaged.
    """

    def __init__(self, folder: str, key: str) -> None:
        self._shards = Shards(folder, key)

    def batch(self, indices: Sequence[int], input_ids: Tensor) -> TeacherBatch:
        stored = self._shards.take(indices)
        if stored["tokens"].shape[:2] != input_ids.shape:
            raise StorageError(
                f"{self._shards.folder}: {list(stored['tokens'].shape[:2])} tokens where the rows have "
                f"{list(input_ids.shape)}",
                "store this teacher's most likely tokens of these rows",
            )
        device = input_ids.device
        top = TopK(*(stored[name].flatten(0, 1).to(device) for name in ("log_probs", "tokens")))
        return {"teacher_top_k": top}

    def prefetch(self, indices: Sequence[int]) -> None:
        self._shards.prefetch(indices)

    def mass_lost(self) -> MassLost:
        """The probability that the store leaves out, over all of its tokens."""
        notes = list(self._shards.notes())
        tokens = sum(note["tokens"] for note in notes)
        lost = math.fsum(note["lost"] for note in notes)
        return MassLost(lost / tokens, max(note["worst"] for note in notes))


def store_top_k(
    load_teacher: Callable[[], nn.Module],
    rows: Rows,
    folder: str,
    k: int,
    *,
    key: str,
    documents: DocumentBoundaries | None = None,
    **how: Unpack[Writing],
) -> int:
    """Write the `k` most likely next tokens, int32, and their log-probabilities, float32, both [rows, seq_length, k] and the
    likeliest first: 8·k bytes per token. Otherwise like `store_hidden`; see `TopKTeacher.mass_lost` for what is lost.

    Raises InputError for a `k` below 1 or above the size of the vocabulary.
    """

    def load() -> RowModel:
        model = load_teacher()
        head = Head.of(model)
        if not 1 <= k <= len(head.weight):
            raise InputError(f"k: {k} of a vocabulary of {len(head.weight)}", "store 1 token or more, up to all")

        def compute(input_ids: Tensor) -> dict[str, Tensor]:
            top = top_tokens(head, final_hidden(model, input_ids, documents).flatten(0, 1), k)
            shape = (*input_ids.shape, k)
            return {"log_probs": top.log_probs.view(shape), "tokens": top.tokens.int().view(shape)}

        return RowModel(model, compute, rows.seq_length * 8 * k)

    return write_shards(load, rows, folder, key=key, note=_lost, **how)


def top_tokens(head: Head, hidden: Tensor, k: int) -> TopK:
    """The `k` most likely tokens at hidden states [n, d], the likeliest first."""
    buffer = cache_buffer(head.weight)
    parts = [log_softmax_slices_(logits, buffer).topk(k) for logits in head.chunks(hidden)]
    return TopK(torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts]))


def _lost(tensors: dict[str, Tensor]) -> dict[str, Any]:
    lost = (1.0 - tensors["log_probs"].double().exp().sum(-1)).clamp_(min=0.0)
    return {"tokens": lost.numel(), "lost": float(lost.sum()), "worst": float(lost.max())}
