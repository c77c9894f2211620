"""Loss of a model on held-out rows, and its distance to a teacher on the same tokens.

Candidates are compared by these numbers, so they are exact: logits in fp32 from the model's own final hidden states
and head, means in float64, over every position that has a next token. No [tokens, vocabulary] tensor outlives a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from minitron.data import DocumentBoundaries
from minitron.errors import InputError, NonFiniteError
from minitron.evaluation.mode import evaluating
from minitron.logits import CHUNK_TOKENS, Head, cache_slices, log_softmax_, tokens_per_chunk
from minitron.models import final_hidden


@dataclass(frozen=True)
class HeldoutMetrics:
    """Means over `tokens` predicted tokens; rows have equal length, so each is also the mean of its per-row values."""

    loss: float
    """Next-token cross-entropy, nats per token."""
    kl: float | None
    """KL(teacher || student), nats per token; None without a teacher."""
    top1_agreement: float | None
    """Share of positions where student and teacher rank the same token first; None without a teacher."""
    tokens: int
    per_row_loss: list[float]
    """[num_rows], for paired statistics between models scored on the same rows."""
    per_row_kl: list[float] | None


class TeacherTargets(TypedDict):
    """What `heldout_metrics` needs to know of a teacher."""

    teacher_hidden: Callable[[slice], Tensor]
    teacher_head: Head
    documents: DocumentBoundaries | None


def teacher_targets(teacher_model: Any, rows: Tensor, documents: DocumentBoundaries | None = None) -> TeacherTargets:
    """A live teacher's targets for `rows`: `heldout_metrics(student, rows, **teacher_targets(teacher, rows))`.

    Hidden states [n, seq_length, hidden] are computed when asked for, in the teacher's dtype and on its device.
    """
    head = Head.of(teacher_model)

    def hidden(which: slice) -> Tensor:
        with torch.inference_mode(), evaluating(teacher_model):
            return final_hidden(teacher_model, rows[which].to(head.weight.device), documents)

    return {"teacher_hidden": hidden, "teacher_head": head, "documents": documents}


def heldout_metrics(
    model: Any,
    rows: Tensor,
    *,
    teacher_hidden: Callable[[slice], Tensor] | None = None,
    teacher_head: Head | None = None,
    documents: DocumentBoundaries | None = None,
    batch_rows: int = 4,
    chunk_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HeldoutMetrics:
    """Score `model` on `rows`, int64 [num_rows, seq_length], every position predicting the next one.

    `teacher_hidden(slice of rows)` gives the teacher's final hidden states [n, seq_length, teacher_hidden_size] (after
    the last norm) and `teacher_head` turns them into logits over the same vocabulary; both or neither. At most
    `chunk_tokens` x vocabulary logits exist at a time, once for each model; by default 512 tokens', fewer where the
    vocabulary is so large that they would take more than 128 MiB (on a GPU 512). `progress(done, total)` counts rows.

    With `documents` the rows' documents do not see each other; the teacher has to have seen them in the same way.
    The model's training mode and the global random state are left as they were.
    Raises InputError for rows or a head that do not fit the model, NonFiniteError naming the first row whose loss or KL
    is NaN or infinite.
    """
    student_head = Head.of(model)
    _check(rows, student_head, teacher_hidden, teacher_head)
    device = student_head.weight.device
    other_head = None if teacher_head is None else teacher_head.to(device)

    num_rows, seq_length = rows.shape
    row_loss: list[float] = []
    row_kl: list[float] = []
    agreed = 0
    with torch.inference_mode(), evaluating(model):
        # kept for all chunks: memory of this size goes back to the system when it is freed, and is slow to come again
        chunk_tokens = chunk_tokens or tokens_per_chunk(student_head.weight, CHUNK_TOKENS)
        shape = min(chunk_tokens, batch_rows * seq_length), len(student_head.weight)
        own_space = torch.empty(shape, device=device)
        other_space = None if other_head is None else torch.empty(shape, device=device)
        for start in range(0, num_rows, batch_rows):
            which = slice(start, min(start + batch_rows, num_rows))
            ids = rows[which].to(device)
            hidden = final_hidden(model, ids, documents)[:, :-1].flatten(0, 1)
            targets = ids[:, 1:].flatten()
            other = None if teacher_hidden is None else _teacher_batch(teacher_hidden, which, seq_length, device)
            loss, kl = [], []
            for first in range(0, len(targets), chunk_tokens):
                chunk = slice(first, first + chunk_tokens)
                student_logits = student_head.logits(hidden[chunk], own_space)
                teacher_logits = None
                if other is not None and other_head is not None:
                    teacher_logits = other_head.logits(other[chunk], other_space)
                for part in cache_slices(student_logits):
                    student = log_softmax_(student_logits[part])
                    loss.append(-student.gather(1, targets[chunk][part, None])[:, 0].double())
                    if teacher_logits is not None:
                        teacher = log_softmax_(teacher_logits[part])
                        agreed += int((student.argmax(-1) == teacher.argmax(-1)).sum())
                        kl.append(torch.linalg.vecdot(teacher.exp(), teacher.sub_(student)).double())
            row_loss += torch.cat(loss).view(-1, seq_length - 1).mean(1).tolist()
            if kl:
                row_kl += torch.cat(kl).view(-1, seq_length - 1).mean(1).tolist()
            if progress is not None:
                progress(which.stop, num_rows)

    for name, values in (("loss", row_loss), ("KL", row_kl)):
        for row, value in enumerate(values):
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"held-out row {row}: {name} is {value}", "the weights or hidden states are broken"
                )
    tokens = num_rows * (seq_length - 1)
    return HeldoutMetrics(
        loss=math.fsum(row_loss) / num_rows,
        kl=math.fsum(row_kl) / num_rows if teacher_hidden is not None else None,
        top1_agreement=agreed / tokens if teacher_hidden is not None else None,
        tokens=tokens,
        per_row_loss=row_loss,
        per_row_kl=row_kl if teacher_hidden is not None else None,
    )


def _check(
    rows: Tensor, head: Head, teacher_hidden: Callable[[slice], Tensor] | None, teacher_head: Head | None
) -> None:
    vocabulary = head.weight.shape[0]
    if rows.dtype != torch.int64 or rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] < 2:
        raise InputError(
            f"rows: {rows.dtype} {list(rows.shape)}", "give token ids as int64 [num_rows, seq_length], seq_length >= 2"
        )
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= vocabulary:
        raise InputError(
            f"rows: token ids {low} to {high} where the model's vocabulary has {vocabulary}",
            "tokenise the rows with the model's own tokenizer",
        )
    if (teacher_hidden is None) != (teacher_head is None):
        raise InputError("teacher_hidden and teacher_head: only one was given", "give both, or neither")
    if teacher_head is not None and teacher_head.weight.shape[0] != vocabulary:
        raise InputError(
            f"teacher_head: vocabulary of {teacher_head.weight.shape[0]}, the model's has {vocabulary}",
            "KL needs one vocabulary for both; use a teacher with the same tokenizer and head",
        )


def _teacher_batch(
    teacher_hidden: Callable[[slice], Tensor], which: slice, seq_length: int, device: torch.device
) -> Tensor:
    hidden = teacher_hidden(which)
    if hidden.shape[:2] != (which.stop - which.start, seq_length):
        raise InputError(
            f"teacher_hidden: {list(hidden.shape)} for rows {which.start} to {which.stop} of {seq_length} tokens",
            "store the teacher's hidden states for these same rows",
        )
    return hidden.to(device)[:, :-1].flatten(0, 1)
