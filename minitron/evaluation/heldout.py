"""Loss of a model on held-out rows, and its KL divergence from a teacher on the same tokens.

Candidates are ranked by these numbers, so they are computed precisely: float32 logits from the model's final hidden states
and its head, and float64 means over every position that has a next token. Logits exist for one chunk of tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from minitron.arguments import check_model, check_rows
from minitron.data import DocumentBoundaries
from minitron.errors import InputError, NonFiniteError
from minitron.evaluation.mode import evaluating
from minitron.logits import (
    CHUNK_TOKENS,
    Head,
    cache_buffer,
    cache_slices,
    first_rows,
    log_softmax_,
    tokens_per_chunk,
)
from minitron.models import final_hidden
from minitron.processes import all_rows, dealt

BATCH_ROWS, BATCH_TOKENS = 4, 16_384  # of a forward pass, at most


@dataclass(frozen=True)
class HeldoutMetrics:
    """Means over `tokens` predicted tokens, which are also the means of the per-row values because rows have equal length."""

    loss: float
    """Next-token cross-entropy, nats per token."""
    kl: float | None
    """KL(teacher || student), nats per token; None without a teacher."""
    top1_agreement: float | None
    """Share of positions where student and teacher rank the same token first; None without a teacher."""
    tokens: int
    per_row_loss: list[float]
    """[num_rows], nats per token; for paired comparisons of models on the same rows."""
    per_row_kl: list[float] | None
    """[num_rows], nats per token; None without a teacher."""


class TeacherTargets(TypedDict):
    """The arguments of `heldout_metrics` that describe a teacher."""

    teacher_hidden: Callable[[slice], Tensor]
    teacher_head: Head
    documents: DocumentBoundaries | None


def teacher_targets(teacher_model: Any, rows: Tensor, documents: DocumentBoundaries | None = None) -> TeacherTargets:
    """Targets of a loaded teacher for `rows`: `heldout_metrics(student, rows, **teacher_targets(teacher, rows))`.

    rows: int64 [num_rows, seq_length]. Final hidden states [n, seq_length, hidden] are computed on demand, in the teacher's
    dtype and on its device. documents: as in `heldout_metrics`. Raises InputError for arguments of the wrong type.
    """
    check_model("teacher_model", teacher_model)
    check_rows("rows", rows)
    head = Head.of(teacher_model)

    def hidden(batch: slice) -> Tensor:
        with torch.inference_mode(), evaluating(teacher_model):
            return final_hidden(teacher_model, rows[batch].to(head.weight.device), documents)

    return {"teacher_hidden": hidden, "teacher_head": head, "documents": documents}


def rows_per_batch(seq_length: int) -> int:
    """Number of rows in a forward pass of `heldout_metrics`, unless it is told another."""
    return max(1, min(BATCH_ROWS, BATCH_TOKENS // seq_length))


def batches_of(num_rows: int, batch_rows: int) -> list[slice]:
    """The row numbers of each forward pass of `heldout_metrics`."""
    return [slice(start, min(start + batch_rows, num_rows)) for start in range(0, num_rows, batch_rows)]


def heldout_metrics(
    model: Any,
    rows: Tensor,
    *,
    teacher_hidden: Callable[[slice], Tensor] | None = None,
    teacher_head: Head | None = None,
    documents: DocumentBoundaries | None = None,
    batch_rows: int | None = None,
    chunk_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    together: bool = False,
) -> HeldoutMetrics:
    """Next-token loss of `model` on `rows`, int64 [num_rows, seq_length], and its agreement with a teacher.

    teacher_hidden: a function from a slice of row numbers to the teacher's final hidden states (after the last norm),
    [n, seq_length, teacher_hidden_size]. teacher_head: its head, over the same vocabulary. Give both or neither. documents:
    if given, tokens attend only to their own document; the teacher's hidden states must have been computed in the same way.
    batch_rows: rows per forward pass; by default 4, or as many as have 16,384 tokens if that is fewer. chunk_tokens: number
    of tokens whose float32 logits exist at a time, for each model; by default 512, or fewer for a vocabulary so large that
    they would take more than 128 MiB (512 MiB on a GPU). `progress(done, total)` counts rows. together: all processes of
    torch.distributed call this alike and share the batches; each gets the metrics of all rows, which equal those of one
    process bit for bit, since each batch is computed as a whole.

    The model's training mode and the global random state are not changed. Raises InputError for rows or a head that do not
    fit the model and for arguments of the wrong type, NonFiniteError naming the first row whose loss or KL is NaN or infinite.
    """
    check_model("model", model)
    check_rows("rows", rows, shortest=2)
    student_head = Head.of(model)
    _check(rows, student_head, teacher_hidden, teacher_head)
    device = student_head.weight.device
    head_on_device = None if teacher_head is None else teacher_head.to(device)

    num_rows, seq_length = rows.shape
    batch_rows = batch_rows or rows_per_batch(seq_length)
    batches = batches_of(num_rows, batch_rows)
    scores: list[tuple[float, ...]] = []  # of each row: its number, loss, KL and positions with the same first token
    with torch.inference_mode(), evaluating(model):
        chunk_tokens = chunk_tokens or tokens_per_chunk(student_head.weight, CHUNK_TOKENS)
        scorer = _TokenScorer(student_head, head_on_device, min(chunk_tokens, batch_rows * seq_length))
        for batch, counts in dealt(batches, model, together=together):
            ids = rows[batch].to(device)
            hidden = final_hidden(model, ids, documents)[:, :-1].flatten(0, 1)
            theirs = None if teacher_hidden is None else _teacher_batch(teacher_hidden, batch, seq_length, device)
            of_tokens = scorer.scores(hidden, ids[:, 1:].flatten(), theirs)
            if counts:
                loss, kl, same = (score.view(-1, seq_length - 1) for score in of_tokens)
                of_rows = torch.stack([loss.mean(1), kl.mean(1), same.sum(1, dtype=torch.float64)]).tolist()
                scores += zip(range(batch.start, batch.stop), *of_rows, strict=True)
            if progress is not None:
                progress(batch.stop, num_rows)

    of_all = sorted(all_rows(torch.tensor(scores, dtype=torch.float64).view(-1, 4), together).tolist())
    row_loss, row_kl = [row[1] for row in of_all], [row[2] for row in of_all] if teacher_hidden else []
    same_tokens = int(sum(row[3] for row in of_all))
    for name, values in (("loss", row_loss), ("KL", row_kl)):
        for row, value in enumerate(values):
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"held-out row {row}: {name} is {value}",
                    "check the model's weights and the teacher's hidden states for values that are not finite",
                )
    tokens = num_rows * (seq_length - 1)
    return HeldoutMetrics(
        loss=math.fsum(row_loss) / num_rows,
        kl=math.fsum(row_kl) / num_rows if teacher_hidden is not None else None,
        top1_agreement=same_tokens / tokens if teacher_hidden is not None else None,
        tokens=tokens,
        per_row_loss=row_loss,
        per_row_kl=row_kl if teacher_hidden is not None else None,
    )


class _TokenScorer:
    """Compares a student's predictions with the next tokens and with a teacher. `tokens` logits of each model exist at a time.

    Their memory is kept for all chunks: when it is freed it goes back to the system, and is slow to come again.
    """

    def __init__(self, student: Head, teacher: Head | None, tokens: int) -> None:
        shape, device = (tokens, len(student.weight)), student.weight.device
        self._student, self._student_logits = student, torch.empty(shape, device=device)
        self._teacher, self._teacher_logits = teacher, None if teacher is None else torch.empty(shape, device=device)
        self._buffer = cache_buffer(student.weight)

    def scores(self, hidden: Tensor, targets: Tensor, theirs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of n tokens the loss and KL(teacher || student), float64 [n], and whether both rank the same token first, bool [n];
        the last two are zero without a teacher. hidden, theirs: final hidden states of student and teacher, [n, d]. targets:
        next tokens, int64 [n]."""
        loss = torch.empty(len(targets), dtype=torch.float64, device=hidden.device)
        kl, same = torch.zeros_like(loss), torch.zeros_like(loss, dtype=torch.bool)
        size = len(self._student_logits)
        for first in range(0, len(targets), size):
            chunk = slice(first, first + size)
            student_logits = self._student.logits(hidden[chunk], self._student_logits)
            teacher_logits = None
            if theirs is not None and self._teacher is not None:
                teacher_logits = self._teacher.logits(theirs[chunk], self._teacher_logits)
            for part in cache_slices(student_logits):
                student = log_softmax_(student_logits[part], buffer=self._buffer)
                loss[chunk][part] = -student.gather(1, targets[chunk][part, None])[:, 0].double()
                if teacher_logits is not None:
                    teacher = log_softmax_(teacher_logits[part], buffer=self._buffer)
                    same[chunk][part] = student.argmax(-1) == teacher.argmax(-1)
                    probability = torch.exp(teacher, out=first_rows(self._buffer, teacher))
                    kl[chunk][part] = probability.mul_(teacher.sub_(student)).sum(-1).double()
        return loss, kl, same


def _check(
    rows: Tensor, head: Head, teacher_hidden: Callable[[slice], Tensor] | None, teacher_head: Head | None
) -> None:
    vocabulary = head.weight.shape[0]
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= vocabulary:
        raise InputError(
            f"rows: token ids from {low} to {high}, but the model's vocabulary has {vocabulary} tokens",
            "tokenise the rows with the model's own tokenizer",
        )
    if (teacher_hidden is None) != (teacher_head is None):
        raise InputError("teacher_hidden and teacher_head: only one was given", "give both, or neither")
    if teacher_head is not None and teacher_head.weight.shape[0] != vocabulary:
        raise InputError(
            f"teacher_head: its vocabulary has {teacher_head.weight.shape[0]} tokens, but the model's has {vocabulary}",
            "use a teacher with the same tokenizer and vocabulary",
        )


def _teacher_batch(
    teacher_hidden: Callable[[slice], Tensor], batch: slice, seq_length: int, device: torch.device
) -> Tensor:
    hidden = teacher_hidden(batch)
    if hidden.shape[:2] != (batch.stop - batch.start, seq_length):
        raise InputError(
            f"teacher_hidden: {list(hidden.shape)} for rows {batch.start} to {batch.stop} of {seq_length} tokens",
            "give the teacher's hidden states of the same rows",
        )
    return hidden.to(device)[:, :-1].flatten(0, 1)
