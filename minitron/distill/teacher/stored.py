"""The teacher's final hidden states of rows, stored once and read by all trials and distillations on these rows.

The exact logits are computed again from a hidden state with the teacher's own head, so nothing is lost. A token takes 2·hidden
bytes in bfloat16 instead of 2·vocabulary. The log-sum-exp of the logits is stored too, so that the loss passes over the
teacher's logits once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from minitron import storage
from minitron.arguments import check_type
from minitron.data import DocumentBoundaries, Rows
from minitron.distill.teacher.live import TeacherBatch
from minitron.distill.teacher.shard_writing import RowModel, Writing, write_shards
from minitron.distill.teacher.shards import Shards
from minitron.errors import StorageError
from minitron.logits import Head, cache_slices, logsumexp
from minitron.models import final_hidden


class StoredTeacher:
    """Hidden states read from a store that `store_hidden` completed, bit-equal to what was written.

    open_store: opens the folder for a key; several teachers can share an open store this way.
    Raises StorageError if the store is not complete, was made from another teacher or other rows, or is damaged.
    """

    def __init__(self, folder: str, head: Head, key: str, *, open_store: Callable[[str, str], Shards] = Shards) -> None:
        check_type("head", head, Head)
        self.head = head
        self._shards = open_store(folder, key)

    def batch(self, indices: Sequence[int], input_ids: Tensor) -> TeacherBatch:
        stored = self._take(indices, input_ids)
        return {
            "teacher_hidden": stored["hidden"].flatten(0, 1).to(input_ids.device),
            "teacher_head": self.head,
            "teacher_log_sum_exp": stored["log_sum_exp"].flatten().to(input_ids.device),
        }

    def prefetch(self, indices: Sequence[int]) -> None:
        self._shards.prefetch(indices)

    def hidden(self, indices: Sequence[int], input_ids: Tensor) -> Tensor:
        """Final hidden states [n, seq_length, hidden] of the rows with these numbers and tokens, on the tokens' device."""
        return self._take(indices, input_ids)["hidden"].to(input_ids.device)

    def _take(self, indices: Sequence[int], input_ids: Tensor) -> dict[str, Tensor]:
        stored = self._shards.take(indices)
        expected = (*input_ids.shape, self.head.weight.shape[1])
        if stored["hidden"].shape != expected:
            raise StorageError(
                f"{self._shards.folder}: hidden states {list(stored['hidden'].shape)} where rows and head have "
                f"{list(expected)}",
                "store this teacher's hidden states of these rows",
            )
        return stored


def store_key(teacher_id: str, rows: str, dtype: str, top_k: int = 0, *, separate_documents: bool = False) -> str:
    """Fingerprint of the stored outputs of one teacher for one set of rows in one dtype: hidden states, or with `top_k` the
    most likely tokens."""
    content = {"teacher": teacher_id, "rows": rows, "dtype": dtype, "top_k": top_k, "format": 2}
    return storage.fingerprint(content | ({"documents": "separate"} if separate_documents else {}))


def stored_bytes(num_rows: int, seq_length: int, hidden_size: int, value_bytes: int, top_k: int = 0) -> int:
    """Bytes that `store_hidden` writes, or `store_top_k` if `top_k` is not 0, without the files' headers.

    value_bytes: bytes of one number in the hidden states.
    """
    return num_rows * seq_length * (8 * top_k if top_k else hidden_size * value_bytes + 4)


def store_hidden(
    load_teacher: Callable[[], nn.Module],
    rows: Rows,
    folder: str,
    *,
    key: str,
    documents: DocumentBoundaries | None = None,
    **how: Unpack[Writing],
) -> int:
    """Write the hidden states of every row, and the log-sum-exp of their logits, float32 [rows, seq_length], in shards of
    about 256 MiB; returns the number of rows that the teacher ran on in this call.

    Existing shards are kept, so that a killed run resumes. `load_teacher` is called only if a shard is missing. With
    `documents` the teacher does not attend from one document of a row to another; `key` must reflect that. The other keyword
    arguments are those of `Writing`.
    Raises StorageError for a folder that holds something else, and before writing, with the bytes needed and the rows that
    fit, when the disk is too small.
    """

    def load() -> RowModel:
        model = load_teacher()
        head = Head.of(model)

        def compute(input_ids: Tensor) -> dict[str, Tensor]:
            hidden = final_hidden(model, input_ids, documents)
            return {"hidden": hidden, "log_sum_exp": log_sum_exp(head, hidden)}

        hidden_size, dtype = head.weight.shape[1], next(model.parameters()).dtype
        return RowModel(model, compute, stored_bytes(1, rows.seq_length, hidden_size, dtype.itemsize))

    return write_shards(load, rows, folder, key=key, **how)


def log_sum_exp(head: Head, hidden: Tensor) -> Tensor:
    """log Σ exp over the vocabulary of the logits of hidden states [..., d]: float32 [...]."""
    parts = [
        logsumexp(logits[rows], out=logits[rows])
        for logits in head.chunks(hidden.flatten(0, -2))
        for rows in cache_slices(logits)
    ]
    return torch.cat(parts).view(hidden.shape[:-1])
